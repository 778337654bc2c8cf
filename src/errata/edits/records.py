"""What a closed-form delta was solved from, kept with it: enough to solve again without the host.

With keys K, the change R wanted at them relative to the host without the edit, and Y = M^-1 K,

    delta = R (K^T Y + gamma I)^-1 Y^T

so a history of such fits under one metric M is one ridge regression: refitting all records at once,
or all but some, needs neither the model nor its statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.errors import EditError
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import from_solved, influence


@dataclass(frozen=True)
class Record:
    """Keys, what is wanted at them, and the metric's answer to them, one column a key."""

    PARTS: ClassVar[tuple[str, ...]] = ("keys", "wanted", "solved")

    keys: Tensor
    """K ``[d_in, n]``."""
    wanted: Tensor
    """R ``[d_out, n]``, relative to the host without the edit: an absolute target."""
    solved: Tensor
    """Y = M^-1 K ``[d_in, n]``."""
    gamma: float
    """Ridge in the dual; 0 fits exactly."""
    metric: str
    """Name of M: statistics, weight, subspace. Records under different metrics do not join."""
    requests: tuple[int, ...]
    """Per column, the index of its request in the edit's provenance."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by part."""
        return {part: getattr(self, part) for part in self.PARTS}

    def facts(self) -> dict[str, Any]:
        """Return all but the tensors, as plain data."""
        return {"gamma": self.gamma, "metric": self.metric, "requests": list(self.requests)}

    @staticmethod
    def restored(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Record:
        """Build a record from what :meth:`facts` and :meth:`tensors` gave."""
        return Record(
            **tensors,
            gamma=facts["gamma"],
            metric=facts["metric"],
            requests=tuple(facts["requests"]),
        )

    def shifted(self, by: int) -> Record:
        """Return the record with its request indices moved."""
        return replace(self, requests=tuple(i + by for i in self.requests))

    def joined(self, other: Record) -> Record:
        """Put two records side by side. Raises EditError when their metrics differ."""
        if (self.metric, self.gamma) != (other.metric, other.gamma):
            raise EditError(
                f"records solved under different metrics do not join: {self.metric}, gamma {self.gamma} "
                f"and {other.metric}, gamma {other.gamma}"
            )
        parts = {p: torch.cat([getattr(self, p), getattr(other, p)], 1) for p in self.PARTS}
        return Record(
            **parts, gamma=self.gamma, metric=self.metric, requests=(*self.requests, *other.requests)
        )

    def kept(self, requests: Sequence[int]) -> Record:
        """Return the columns of some requests, renumbered in the order given."""
        place = {request: i for i, request in enumerate(requests)}
        columns = [c for c, request in enumerate(self.requests) if request in place]
        parts = {p: getattr(self, p)[:, columns].contiguous() for p in self.PARTS}
        return Record(
            **parts,
            gamma=self.gamma,
            metric=self.metric,
            requests=tuple(place[self.requests[c]] for c in columns),
        )

    def delta(self) -> LowRank:
        """Solve for the delta of all columns together."""
        return from_solved(self.keys, self.solved, self.wanted, gamma=self.gamma)

    def leverages(self) -> Tensor:
        """Return, per column, how much of its own target it decides, ``[n]`` in 0 to 1.

        Diagonal of G (G + gamma I)^-1 with G = K^T M^-1 K; near 0 where other columns, or what is to
        be preserved, outweigh it.
        """
        return influence(self.keys, self.solved, gamma=self.gamma)
