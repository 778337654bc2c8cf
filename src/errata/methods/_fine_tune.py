"""What FT and FT-L have in common: settings, sites and the descent on dense changes of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host.layout import Site
from errata.host.load import Host
from errata.methods._method import Layers, Workspace, notes, provenance, resolve_layers
from errata.training.tune import Norm, Plan, Stop, tune
from errata.types import Request


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings that FT and FT-L share."""

    layers: Layers = None
    """Layers whose feed-forward output projection is trained; wide: from a twelfth to five sixths of the depth."""
    objective: Literal["target", "prompt_last"] = "target"
    """Loss: autoregressive on the target tokens, or all of them from the prompt's last token (published)."""
    scale: Literal["weight", "published"] = "weight"
    """Unit of the rate and of FT-L's epsilon: the weight's root mean square, or plain numbers."""
    epsilon: float | None = None
    """Bound on the change."""
    learning_rate: float | None = None
    """Adam's rate."""
    steps: int = 25
    """Passes over the requests at most (ROME's code: 25)."""
    stop_loss: float = 1e-2
    """Stop once the loss is below this (ROME's code: 1e-2)."""
    bias: bool = False
    """Whether the bias beside the weight is trained too, at its rate and within its bound (paper: not; ROME's code,
    which trains every parameter whose name holds the layer's, does so in GPT-2 and GPT-J)."""
    stack: Literal["decoder", "encoder"] = "decoder"
    """Which stack of an encoder-decoder the layers are of; other models have one, called decoder."""
    per_step: int | None = None
    """Requests per Adam step; all of them are still one of ``steps``. None: all at once."""
    shuffle: bool = False
    """Whether each pass takes the requests in a new order, drawn from the seed, and not in the order given."""
    end: bool = False
    """Whether the token that ends a text is trained behind each target (LocFT-BF), so that nothing follows it."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(self, "steps", "learning_rate", "epsilon", "per_step")
        if self.end and self.objective == "prompt_last":
            complaints.append("end: expected false with objective prompt_last, which reads one position only")
        return complaints


def editable_layers(
    method: str,
    host: Host,
    requests: Sequence[Request],
    config: FineTuneConfig,
    default: Callable[[int], tuple[int, ...]],
) -> tuple[int, ...]:
    """Return the layers to train, ``default`` from the depth. Raises ConfigError where nothing is requested."""
    if not requests:
        raise ConfigError(f"{method} needs at least one request")
    return resolve_layers(host, config.layers, default, config.stack)


def fine_tune(
    method: str,
    host: Host,
    requests: Sequence[Request],
    config: FineTuneConfig,
    work: Workspace,
    *,
    sites: Sequence[Site],
    rates: Sequence[float],
    bounds: Sequence[float] | None,
    stop: Stop,
    norm: Norm = "inf",
    weight_decay: float = 0.0,
) -> WeightEdit:
    """Return the dense edit that lowers the targets' loss within the bounds.

    ``rates`` and ``bounds``: Adam's rate and how far the change may go, per site, in plain numbers.
    """
    plan = Plan(
        objective=config.objective,
        steps=config.steps,
        rates=tuple(rates),
        stop=stop,
        bounds=None if bounds is None else tuple(bounds),
        norm=norm,
        weight_decay=weight_decay,
        per_step=config.per_step,
        bias=config.bias,
        shuffle=work.seed if config.shuffle else None,
        end=config.end,
    )
    changes, outcome = tune(
        host, requests, sites, plan, rows=work.batch_size, tick=lambda *at: work.on_progress(method, *at)
    )
    return WeightEdit(
        dict(changes),
        frozenset(site.parameter for site in sites if site.transposed),
        provenance(method, host, requests, config, work, **notes(outcome.facts())),
    )
