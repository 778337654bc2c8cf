"""Settings that several methods share, and what makes a published run reproducible by settings alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

from errata.config import positive
from errata.linalg.solve import RIDGE
from errata.locate.values import Scale, Stop, ValueConfig
from errata.methods._stabilise import check_steps

# --- the search for values ------------------------------------------------------------------


@dataclass(frozen=True)
class Stopping:
    """When a value search ends before its steps do."""

    stop: Literal["loss", "top"] = "loss"
    """Value search: end at ``stop_loss`` (ROME's and MEMIT's code), or also once the target was the first choice
    in every context (ENCORE)."""
    stop_loss: float = 0.05
    """Value search: loss in nats per target token below which it ends (ROME's and MEMIT's code: 0.05)."""
    top_count: int = 1
    """Value search, ``stop: top``: in how many evaluations the target must have been the first choice, in a row or
    not (ENCORE's paper: 1; its code: 4 for GPT-2 XL, 3 for Llama 2 7B, 2 for Llama 3 8B)."""
    top_bare: bool = True
    """Value search, ``stop: top``: whether the bare prompt is one of the contexts that must agree (ENCORE's code:
    no, the prefixed ones alone)."""


@dataclass(frozen=True)
class SearchDefaults:
    """A value search's rate and clamp with their unit, for settings that leave them open."""

    learning_rate: float = 0.5
    clamp: float = 1.5
    scale: Scale = "stream"


class OpenSearch(Protocol):
    """Settings of a value search that may be open."""

    @property
    def learning_rate(self) -> float | None: ...
    @property
    def clamp(self) -> float | None: ...
    @property
    def scale(self) -> Scale | None: ...


class SearchSettings(OpenSearch, Protocol):
    """All settings of a value search."""

    @property
    def steps(self) -> int: ...
    @property
    def decay(self) -> float: ...
    @property
    def kl(self) -> float: ...
    @property
    def stop(self) -> Stop | None: ...
    @property
    def stop_loss(self) -> float: ...
    @property
    def top_count(self) -> int | None: ...
    @property
    def top_bare(self) -> bool | None: ...


S = TypeVar("S", bound=OpenSearch)


def fill_search_defaults(config: S, defaults: SearchDefaults) -> S:
    """Fill in a value search's rate, clamp and unit where the settings leave them open."""
    names = ("scale", "learning_rate", "clamp")
    missing: dict[str, Any] = {
        name: getattr(defaults, name) for name in names if getattr(config, name) is None
    }
    return replace(config, **missing)  # type: ignore[type-var]


def search_config(
    config: SearchSettings, *, nll_loss_factor: float = 1.0, relax: bool = False
) -> ValueConfig:
    """Return the value search that a method's resolved settings describe."""
    assert config.learning_rate is not None and config.clamp is not None and config.scale is not None
    assert config.stop is not None and config.top_count is not None and config.top_bare is not None
    return ValueConfig(
        steps=config.steps, learning_rate=config.learning_rate, clamp=config.clamp, decay=config.decay,
        kl=config.kl, stop_loss=config.stop_loss, scale=config.scale, stop=config.stop,
        top_count=config.top_count, top_bare=config.top_bare, nll_loss_factor=nll_loss_factor, relax=relax,
    )  # fmt: skip


# --- what closed-form methods read and write ------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """What a method otherwise takes from the model itself."""

    prefixes: tuple[str, ...] | None = None
    """Context prefixes, each put before the prompt as it is ("The old road. "), instead of sampled ones; the
    bare prompt comes first in any case. None: as many as ``contexts`` says, written by the model."""
    moments: str | None = None
    """File of second moments of keys to use instead of statistics taken here, {} in its name for the layer's number:
    .npz as ROME's and MEMIT's code writes them, or .safetensors with a matrix [m, m] per parameter."""


@dataclass(frozen=True)
class Ridge:
    """What keeps C invertible."""

    cov_ridge: float = RIDGE
    """Ridge on C in its mean diagonal entries (the authors' code of ROME, MEMIT and their relatives: 0)."""


@dataclass(frozen=True)
class ClosedFormConfig(Inputs, Stopping):
    """Settings that the closed-form methods share; values in brackets are the papers'."""

    layers: tuple[int, ...] | None = None
    """Layers to write, the value search at the last. None: published for known models, else from depth."""
    steps: int = 25
    """Value search: Adam steps at most (MEMIT's code: 20 to 25)."""
    learning_rate: float | None = None
    """Value search: Adam's rate, in the unit of ``scale``. None: published for known models, else 0.5
    (MEMIT's code: 0.5, plain; 0.1 for Llama 3)."""
    clamp: float | None = None
    """Value search: largest shift, in the unit of ``scale``. None: published for known models, else 1.5
    (MEMIT's code: 0.75; other code up to 4)."""
    scale: Literal["stream", "site", "published"] | None = None
    """Value search: unit of rate and clamp: the residual stream above the layer, the vector that is shifted,
    or as published (rate plain, clamp in norms of that vector). None: published for known models, else stream."""
    decay: float = 0.5
    """Value search: weight of the shift's norm (MEMIT's code: 0.5)."""
    kl: float = 0.0625
    """Value search: weight of the divergence at "{subject} is a" (MEMIT's code: 0.0625)."""
    contexts: int = 5
    """How many sampled prefixes; together they count as much as the bare prompt (MEMIT's code: 5)."""
    context_tokens: int = 10
    """Their length in tokens (MEMIT's code: 10)."""
    tokens: int = 1_000_000
    """Token budget of the second moments (MEMIT: 100,000 articles)."""
    merge: bool = True
    """One value for requests that share their text up to the subject (MEMIT-Merge, arXiv 2502.07322)."""
    stabilise: tuple[str, ...] = ()
    """Steps on values or deltas, in order: nas, rect, sphere, prune, simie, each with :setting after it."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("steps", "learning_rate", "clamp", "tokens", "context_tokens", "top_count")
        return [*positive(self, *names), *at_least_zero(self, "stop_loss"), *check_steps(self.stabilise)]


@dataclass(frozen=True)
class CovarianceConfig(ClosedFormConfig, Ridge):
    """Further settings where a change costs under lambda C."""

    cov_weight: float | None = None
    """lambda, how many keys of the corpus weigh against the edits. None: published, else the rule below."""
    cov_relative: float = 0.1
    """lambda in key widths m where cov_weight is None and none is published (papers: 1 to 3 for their models)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        own = [*positive(self, "cov_weight", "cov_relative"), *at_least_zero(self, "cov_ridge")]
        return [*super().problems(), *own]


@dataclass(frozen=True)
class NullSpaceConfig(ClosedFormConfig):
    """Further settings where a change may only go where keys of the corpus hardly reach."""

    energy: float = 0.99
    """Share of the second moment's trace that must stay untouched; what is left is the null space."""
    threshold: float | None = None
    """Eigenvalues of C below this span the null space, instead of ``energy`` (code: 2e-2; paper: 1e-2)."""
    ridge_relative: float = 0.003
    """L2 in mean squared norms of the corpus's keys, where ``ridge`` is open (chosen on the lab)."""
    ridge: float | None = None
    """L2, plain (code: 10; EasyEdit: 1 for Llama 3 and Qwen). None: ``ridge_relative``, or 10 with ``projection``."""
    projection: str | None = None
    """File of the projection P onto the null space, used instead of ``energy`` and ``threshold``: .pt as the authors'
    code writes it (null_space_project.pt, its layers in the order of ``layers``), .npz or .safetensors."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [*super().problems(), *positive(self, "threshold", "ridge", "ridge_relative", "energy")]
        if self.energy >= 1:
            complaints.append(f"energy: expected a share below 1, found {self.energy}")
        return complaints


@dataclass(frozen=True)
class SequentialDefaults:
    """What differs for methods built for long sequences: shorter shifts where many edits add up."""

    clamp: float | None = None
    """Value search: largest shift, in the unit of ``scale``. None: published for known models; else 1.5 for one
    request alone, and 0.75 for several requests or on top of an earlier edit, for many edits add up. A
    sequence of single requests begins like one request alone: name the clamp there (authors' code: 0.75)."""


def at_least_zero(config: Any, *names: str) -> list[str]:
    """List complaints about settings that are negative or infinite; None is fine."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{name}: expected 0 or more, found {value}"
        for name, value in values.items()
        if value is not None and not 0 <= value < float("inf")
    ]
