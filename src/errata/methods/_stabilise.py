"""Stabilisers for many edits in sequence: steps that change a target value or a delta.

They are added to the closed-form methods by name, ``stabilise: [nas, rect:0.4]``, in the order given:

nas      rescale every value to the mean norm in the unedited model (arXiv 2602.02543)
rect     keep only the entries with the largest relative change (RECT, arXiv 2401.04700)
sphere   damp the change along the weight's main input directions (SPHERE, arXiv 2510.01172)
prune    shrink singular values of all changes so far that exceed the weight's largest (PRUNE, arXiv 2405.16821)
simie    refit the change by ridge regression on the keys of all earlier tokens (SimIE, ICML 2025)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.edits.weight import Delta, WeightEdit, add_deltas
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg import shape
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import CostMatrix, from_solved
from errata.locate.keys import all_keys
from errata.methods._method import without
from errata.registry import unknown
from errata.types import Request


@dataclass(frozen=True)
class StepContext:
    """The inputs of a step."""

    host: Host
    site: Site
    requests: Sequence[Request]
    after: WeightEdit | None
    """The edit that this fit continues, in place on the host."""
    state: dict[str, Tensor]
    """The step's tensors for later fits; stored in the edit."""

    @property
    def weight(self) -> Tensor:
        """The present weight ``[d_out, d_in]``, float32 at least."""
        return self.host.weight(self.site).cpu()

    @property
    def before(self) -> Delta | None:
        """The change by earlier edits."""
        return self.after.deltas.get(self.site.parameter) if self.after else None


class Step:
    """One stabiliser. Subclasses override the method for what they act on."""

    name: ClassVar[str]
    on: ClassVar[str]

    def values(self, targets: Tensor, start: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return other values to write; all ``[n, d]``."""
        return targets

    def delta(self, context: StepContext, delta: Delta) -> Delta:
        """Return another change of a weight ``[d_out, d_in]``."""
        return delta


@dataclass(frozen=True)
class Nas(Step):
    """Rescale each value to the mean norm in the unedited model."""

    name: ClassVar[str] = "nas"
    on: ClassVar[str] = "values"

    def values(self, targets: Tensor, start: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Rescale ``[n, d]``; the norm is the mean over the first fit's vectors before they are shifted."""
        norm = state.setdefault("nas.norm", start.norm(dim=1).mean()[None])
        return targets * (norm / targets.norm(dim=1, keepdim=True).clamp_min(1e-12))


@dataclass(frozen=True)
class Rect(Step):
    """Keep only the entries with the largest change relative to the weight."""

    name: ClassVar[str] = "rect"
    on: ClassVar[str] = "delta"
    share: float = 0.4
    """Share of entries kept (paper: 0.4)."""

    def delta(self, context: StepContext, delta: Delta) -> Delta:
        """Zero the other entries; the result is dense."""
        dense = delta.dense() if isinstance(delta, LowRank) else delta
        return shape.largest_entries(dense, context.weight.to(dense.dtype), self.share)


@dataclass(frozen=True)
class Sphere(Step):
    """Damp the change along the main directions of the weight's normalised rows."""

    name: ClassVar[str] = "sphere"
    on: ClassVar[str] = "delta"
    energy: float = 0.5
    """Share of the energy in the directions (authors' code: 0.5)."""
    strength: float = 0.5
    """Share of the change along them that is removed (authors' code: 0.5)."""

    def delta(self, context: StepContext, delta: Delta) -> Delta:
        """Multiply by I - strength V V^T on the input side, also for transposed weights."""
        return shape.damp(delta, shape.leading_inputs(context.weight, self.energy), self.strength)


@dataclass(frozen=True)
class Prune(Step):
    """Shrink the singular values of all changes so far that exceed the unedited weight's largest."""

    name: ClassVar[str] = "prune"
    on: ClassVar[str] = "delta"
    base: float = 1.2
    """Base of the logarithm above the bound (authors' code: 1.2)."""

    def delta(self, context: StepContext, delta: Delta) -> Delta:
        """Add the correction that shrinks the accumulated change."""
        before = context.before
        original, total = context.weight, delta
        if before is not None:
            original = original - (before.dense() if isinstance(before, LowRank) else before)
            total = add_deltas(before, delta)
        return add_deltas(delta, shape.excess(total, shape.largest_singular(original), self.base))


@dataclass(frozen=True)
class Simie(Step):
    """Refit a change by ridge regression on the keys of all tokens so far, in the unedited model."""

    name: ClassVar[str] = "simie"
    on: ClassVar[str] = "delta"
    weight: float = 0.1
    """lambda, in mean squared norms of the first fit's keys (authors' code: 1e4, plain)."""

    def delta(self, context: StepContext, delta: Delta) -> Delta:
        """Return delta K K^T P^-1 with P = lambda I + the sum of K K^T over all fits."""
        site, state = context.site, context.state
        with without(context.after, context.host):
            keys = all_keys(context.host, context.requests, site).mT  # [m, tokens]
        size = state.setdefault(f"{site.parameter}.simie.size", keys.square().sum(0).mean()[None])
        earlier_keys = state.get(f"{site.parameter}.simie.keys")
        token_keys = keys if earlier_keys is None else torch.cat([earlier_keys, keys], 1)
        state[f"{site.parameter}.simie.keys"] = shape.condense(token_keys)
        ridge = CostMatrix.identity(self.weight * float(size))
        changes = torch.zeros(site.d_out, token_keys.shape[1], dtype=keys.dtype)
        changes[:, -keys.shape[1] :] = delta.to(keys.dtype) @ keys
        thin = from_solved(token_keys, ridge.solve(token_keys), changes, gamma=1.0)
        return thin if thin.rank * sum(thin.shape) < thin.shape[0] * thin.shape[1] else thin.dense()


STEPS: dict[str, type[Any]] = {step.name: step for step in (Nas, Rect, Sphere, Prune, Simie)}


def parse(item: str) -> Any:
    """Parse ``name`` or ``name:number:number``. Raises ValueError."""
    name, *numbers = item.split(":")
    if name not in STEPS:
        raise ValueError(unknown(name, list(STEPS), "stabiliser"))
    kind = STEPS[name]
    names = [f.name for f in fields(kind)]
    if len(numbers) > len(names):
        raise ValueError(f"{name} takes {len(names)} numbers at most ({', '.join(names)}), found {item!r}")
    try:
        values = {n: float(v) for n, v in zip(names, numbers, strict=False)}
    except ValueError as error:
        raise ValueError(f"{item!r}: expected numbers after {name}") from error
    wrong = [n for n, v in values.items() if v <= 0]
    if wrong:
        raise ValueError(f"{item!r}: {wrong[0]} must be above zero")
    return kind(**values)


def check_steps(items: Sequence[str]) -> list[str]:
    """List the problems of a ``stabilise`` setting."""
    complaints = []
    for item in items:
        try:
            parse(item)
        except ValueError as error:
            complaints.append(f"stabilise: {error}")
    return complaints


def value_steps(items: Sequence[str]) -> list[Any]:
    """Return the steps that act on values."""
    return [step for step in map(parse, items) if step.on == "values"]


def delta_steps(items: Sequence[str]) -> list[Any]:
    """Return the steps that act on deltas."""
    return [step for step in map(parse, items) if step.on == "delta"]
