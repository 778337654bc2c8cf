"""Shared by FT, FT-L and LocFT-BF: settings, their defaults, sites, and gradient descent on dense weight changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.layout import Site
from errata.host.load import Host
from errata.methods._method import Layers, Workspace, check_requests, notes, provenance, resolve_layers
from errata.training.tune import Norm, Plan, Stop, rms, tune
from errata.types import Request

Scale = Literal["weight", "published"]
C = TypeVar("C", bound="FineTuneConfig")


@dataclass(frozen=True)
class DefaultByScale:
    """A default value in each unit."""

    weight: float
    """In root mean squares of the weight."""
    published: float
    """In plain numbers."""

    def fill(self, value: float | None, scale: Scale) -> float:
        """Return the value, or the default of the scale where it is None."""
        if value is not None:
            return value
        return self.published if scale == "published" else self.weight


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings that FT, FT-L and LocFT-BF share."""

    layers: Layers = None
    """Layers whose feed-forward output projection is trained; wide: from a twelfth to five sixths of the depth."""
    objective: Literal["target", "prompt_last"] = "target"
    """Loss: autoregressive on the target tokens, or all of them from the prompt's last token (published)."""
    scale: Scale = "weight"
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


def resolve(
    method: str,
    host: Host,
    requests: Sequence[Request],
    config: C,
    *,
    default_layers: Callable[[int], tuple[int, ...]],
    learning_rate: DefaultByScale,
) -> C:
    """Return the settings with layers and rate filled in, ``default_layers`` from the depth.

    Raises ConfigError without requests and for layers that the model does not have.
    """
    check_requests(method, requests)
    layers = resolve_layers(host, config.layers, default_layers, config.stack)
    return replace(
        config, layers=layers, learning_rate=learning_rate.fill(config.learning_rate, config.scale)
    )


def sites_of(host: Host, config: FineTuneConfig) -> list[Site]:
    """Return the feed-forward output projections of the layers of resolved settings."""
    assert isinstance(config.layers, tuple)
    layout = host.layout.of(config.stack)
    return [layout.site(layer) for layer in config.layers]


def units(host: Host, sites: Sequence[Site], scale: Scale) -> list[float]:
    """Return the unit of rate and epsilon at each site: its weight's root mean square, 1 for plain numbers."""
    return [1.0 if scale == "published" else rms(host.weight(site)) for site in sites]


def fine_tune(
    method: str,
    host: Host,
    requests: Sequence[Request],
    config: FineTuneConfig,
    work: Workspace,
    *,
    bounds: Sequence[float] | None,
    stop: Stop,
    norm: Norm = "inf",
    weight_decay: float = 0.0,
) -> WeightEdit:
    """Return the dense edit that lowers the targets' loss within the bounds; ``config`` is resolved.

    ``bounds``: how far the change may go, per site, in plain numbers; None: anywhere.
    """
    assert config.learning_rate is not None
    sites = sites_of(host, config)
    plan = Plan(
        objective=config.objective,
        steps=config.steps,
        rates=tuple(config.learning_rate * unit for unit in units(host, sites, config.scale)),
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
