"""What FT, FT-L and LocFT-BF have in common: settings, sites and the descent on dense changes of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.host.layout import Site
from errata.methods._method import Layers, Workspace, check_requests, notes, provenance, resolve_layers
from errata.training.tune import NO_COMPANIONS, Companions, Norm, Plan, Stop, rms, tune
from errata.types import Request

PUBLISHED_RATE = 5e-4
"""Adam's rate in plain numbers: of ROME's baselines, and of LocFT-BF."""


@dataclass(frozen=True)
class FineTuneConfig:
    """Settings that they share."""

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


C = TypeVar("C", bound=FineTuneConfig)


@dataclass(frozen=True)
class Prepared(Generic[C]):
    """What is the same before every fine-tuning: where, and in which units."""

    config: C
    """Settings with layers and rate chosen."""
    sites: tuple[Site, ...]
    units: tuple[float, ...]
    """What a rate or bound of 1 is at each site: the weight's root mean square, or 1 under ``scale: published``."""

    def bounds(self, epsilon: float) -> list[float]:
        """Return the bound on an entry at each site."""
        return [epsilon * unit for unit in self.units]


def prepare(
    method: str, host: Host, requests: Sequence[Request], config: C, *,
    layers: Callable[[int], tuple[int, ...]], rate: float,
) -> Prepared[C]:  # fmt: skip
    """Choose what the settings leave open: layers from the depth, and the rate, given in root mean squares.

    In plain numbers the rate is that of the published code. Raises ConfigError where nothing is requested.
    """
    check_requests(method, requests)
    plain = config.scale == "published"
    numbers = resolve_layers(host, config.layers, layers, config.stack)
    rate = config.learning_rate or (PUBLISHED_RATE if plain else rate)
    sites = tuple(host.layout.of(config.stack).site(layer) for layer in numbers)
    units = tuple(1.0 if plain else rms(host.weight(site)) for site in sites)
    return Prepared(replace(config, layers=numbers, learning_rate=rate), sites, units)


def fine_tune(
    method: str,
    host: Host,
    requests: Sequence[Request],
    prepared: Prepared[Any],
    work: Workspace,
    *,
    bounds: Sequence[float] | None,
    stop: Stop,
    norm: Norm = "inf",
    weight_decay: float = 0.0,
    companions: Companions = NO_COMPANIONS,
) -> WeightEdit:
    """Return the dense edit that lowers the targets' loss within the bounds.

    ``bounds``: how far the change may go, per site, in plain numbers. ``companions``: lines trained beside them.
    """
    config, sites = prepared.config, prepared.sites
    plan = Plan(
        objective=config.objective,
        steps=config.steps,
        rates=tuple(config.learning_rate * unit for unit in prepared.units),
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
        host, requests, sites, plan, rows=work.batch_size, companions=companions,
        tick=lambda *at: work.on_progress(method, *at),
    )  # fmt: skip
    return WeightEdit(
        dict(changes),
        frozenset(site.parameter for site in sites if site.transposed),
        provenance(method, host, requests, config, work, **notes(outcome.facts())),
    )
