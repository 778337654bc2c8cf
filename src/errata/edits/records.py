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
    requests: tuple[tuple[int, ...], ...]
    """Per column, the requests it serves, as indices in the edit's provenance; several share one value."""
    price: float = 1.0
    """What M was multiplied by when the delta was solved (LyapLock's queue)."""
    solves: bool = True
    """Whether the delta is the formula's solution; not so once it was reshaped afterwards."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by part."""
        return {part: getattr(self, part) for part in self.PARTS}

    def facts(self) -> dict[str, Any]:
        """Return all but the tensors, as plain data."""
        return {
            "gamma": self.gamma,
            "metric": self.metric,
            "requests": [list(group) for group in self.requests],
            "solves": self.solves,
            "price": self.price,
        }

    @staticmethod
    def restored(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Record:
        """Build a record from what :meth:`facts` and :meth:`tensors` gave."""
        return Record(
            **tensors,
            gamma=facts["gamma"],
            metric=facts["metric"],
            requests=tuple(tuple(group) for group in facts["requests"]),
            solves=facts["solves"],
            price=facts["price"],
        )

    def contiguous(self) -> Record:
        """Return the record with its tensors laid out row by row."""
        return replace(self, **{part: laid_out(getattr(self, part)) for part in self.PARTS})

    def shifted(self, by: int) -> Record:
        """Return the record with its request indices moved."""
        return replace(self, requests=tuple(tuple(i + by for i in group) for group in self.requests))

    def joined(self, other: Record) -> Record:
        """Put two records side by side, at the price of the other. Raises EditError when metrics differ."""
        if (self.metric, self.gamma) != (other.metric, other.gamma):
            raise EditError(
                f"records solved under different metrics do not join: {self.metric}, gamma {self.gamma} "
                f"and {other.metric}, gamma {other.gamma}"
            )
        parts = {p: torch.cat([getattr(self, p), getattr(other, p)], 1) for p in self.PARTS}
        both = (*self.requests, *other.requests)
        solves = self.solves and other.solves
        return replace(self, **parts, requests=both, solves=solves, price=other.price)

    def kept(self, requests: Sequence[int]) -> Record:
        """Return the columns of some requests, renumbered in the order given.

        Raises EditError when a column serves requests both in and out of the selection.
        """
        place = {request: i for i, request in enumerate(requests)}
        columns = []
        for column, group in enumerate(self.requests):
            inside = [request for request in group if request in place]
            if inside and len(inside) < len(group):
                numbers = ", ".join(str(request + 1) for request in group)
                raise EditError(
                    f"requests {numbers} (counted from 1) share one value, sought for all of them: they go together "
                    "or stay together"
                )
            if inside:
                columns.append(column)
        parts = {p: getattr(self, p)[:, columns].contiguous() for p in self.PARTS}
        groups = tuple(tuple(place[request] for request in self.requests[c]) for c in columns)
        return replace(self, **parts, requests=groups)

    def delta(self) -> LowRank:
        """Solve for the delta of all columns together."""
        solved = self.solved / self.price
        return from_solved(self.keys, solved, self.wanted, gamma=self.gamma)

    def leverages(self) -> Tensor:
        """Return, per column, how much of its own target it decides, ``[n]`` in 0 to 1.

        Diagonal of G (G + gamma I)^-1 with G = K^T M^-1 K; near 0 where other columns, or what is to
        be preserved, outweigh it.
        """
        return influence(self.keys, self.solved / self.price, gamma=self.gamma)


def laid_out(tensor: Tensor) -> Tensor:
    """Return a tensor with the strides a file would give it, axes of length one included.

    Products pick their kernel by strides, and kernels differ in the last bit.
    """
    return tensor.detach().clone(memory_format=torch.contiguous_format)
