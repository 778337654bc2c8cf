"""What a closed-form delta was solved from, stored with it: enough to solve again without the host.

With keys K, the target changes R of the outputs at them (relative to the host without the edit) and Y = M^-1 K,

    delta = R (K^T Y + gamma I)^-1 Y^T

so a history of such fits under one cost matrix M is one ridge regression: refitting all records at once,
or all but some, needs neither the model nor its statistics. Columns that are terms of the cost, P, have no targets:
M is M + P P^T then, for every gamma.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.errors import EditError
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import from_solved, independent_columns, influence, solve_with_history


@dataclass(frozen=True)
class Record:
    """Keys, the target changes of the outputs at them, and M^-1 times the keys; one column a key.

    In files the tensors are called keys, wanted and solved, and the facts metric, price and solves, as in the
    first version of the format.
    """

    PARTS: ClassVar[Mapping[str, str]] = {"keys": "keys", "wanted": "target_changes", "solved": "solved"}
    """Field of each tensor, by its name in files."""

    keys: Tensor
    """K ``[d_in, n]``."""
    target_changes: Tensor
    """R ``[d_out, n]``, relative to the host without the edit: absolute."""
    solved: Tensor
    """Y = M^-1 K ``[d_in, n]``."""
    gamma: float
    """Ridge in the dual; 0 fits exactly."""
    cost: str
    """Name of M: statistics, weight, subspace. Records under different cost matrices do not join."""
    requests: tuple[tuple[int, ...], ...]
    """Per column, the requests it serves, as indices in the edit's provenance; several share one value."""
    cost_scale: float = 1.0
    """What M was multiplied by when the delta was solved (LyapLock's queue)."""
    is_exact_solution: bool = True
    """Whether the delta is the formula's solution; not so once it was reshaped afterwards."""
    in_cost: tuple[bool, ...] = ()
    """Per column, whether it is a term of the cost, k k^T added to M, not a key with a target; empty: none is."""

    def tensors(self) -> dict[str, Tensor]:
        """Return keys ``[d_in, n]``, target changes ``[d_out, n]`` and M^-1 K ``[d_in, n]`` by their names in files."""
        return {name: getattr(self, part) for name, part in self.PARTS.items()}

    def facts(self) -> dict[str, Any]:
        """Return all but the tensors, as plain data for a file's header."""
        return {
            "gamma": self.gamma,
            "metric": self.cost,
            "requests": [list(group) for group in self.requests],
            "solves": self.is_exact_solution,
            "price": self.cost_scale,
            **({"in_cost": list(self.in_cost)} if any(self.in_cost) else {}),
        }

    @staticmethod
    def restore(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Record:
        """Build a record of n columns from its :meth:`facts` and :meth:`tensors`, each ``[d, n]``."""
        return Record(
            **{Record.PARTS[name]: tensor for name, tensor in tensors.items()},
            gamma=facts["gamma"],
            cost=facts["metric"],
            requests=tuple(tuple(group) for group in facts["requests"]),
            is_exact_solution=facts["solves"],
            cost_scale=facts["price"],
            in_cost=tuple(facts.get("in_cost", ())),
        )

    def contiguous(self) -> Record:
        """Return the record with its tensors stored row by row."""
        return replace(self, **{part: contiguous_copy(getattr(self, part)) for part in self.PARTS.values()})

    def shift_requests(self, by: int) -> Record:
        """Return the record with its request indices moved."""
        return replace(self, requests=tuple(tuple(i + by for i in group) for group in self.requests))

    def join(self, other: Record) -> Record:
        """Concatenate the columns of two records, with the other's cost scale. Raises EditError if the costs differ."""
        if (self.cost, self.gamma) != (other.cost, other.gamma):
            raise EditError(
                f"edits solved with different cost matrices cannot be joined: {self.cost}, gamma {self.gamma} "
                f"and {other.cost}, gamma {other.gamma}"
            )
        parts = {p: torch.cat([getattr(self, p), getattr(other, p)], 1) for p in self.PARTS.values()}
        in_cost = [*self._terms(), *other._terms()]
        return replace(
            self,
            **parts,
            requests=(*self.requests, *other.requests),
            is_exact_solution=self.is_exact_solution and other.is_exact_solution,
            cost_scale=other.cost_scale,
            in_cost=tuple(in_cost) if any(in_cost) else (),
        )

    def as_terms(self, keys: Tensor, solved: Tensor, requests: tuple[tuple[int, ...], ...]) -> Record:
        """Return a record that joins this one: keys P ``[d_in, p]`` and M^-1 P as terms of M; ``requests`` of each."""
        dtype, count = self.keys.dtype, len(requests)
        return replace(
            self, keys=keys.to(dtype), solved=solved.to(dtype), requests=requests,
            target_changes=self.target_changes.new_zeros(len(self.target_changes), count), in_cost=(True,) * count,
        )  # fmt: skip

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys with targets ``[d_in, n]``, their target changes ``[d_out, n]``, terms of M ``[d_in, p]``."""
        term = torch.tensor(self._terms(), device=self.keys.device)
        return self.keys[:, ~term], self.target_changes[:, ~term], self.keys[:, term]

    def select(self, requests: Sequence[int]) -> Record:
        """Return the columns of some requests, renumbered in the order given.

        Raises EditError when a column serves requests both in and out of the selection.
        """
        place = {request: i for i, request in enumerate(requests)}
        columns: list[int] = []
        for column, group in enumerate(self.requests):
            inside = [request for request in group if request in place]
            if inside and len(inside) < len(group):
                numbers = ", ".join(str(request + 1) for request in group)
                raise EditError(
                    f"requests {numbers} (counted from 1) share one target value, optimised for all of them: retract "
                    "all of them or none"
                )
            if inside:
                columns.append(column)
        parts = {p: getattr(self, p)[:, columns].contiguous() for p in self.PARTS.values()}
        groups = tuple(tuple(place[request] for request in self.requests[c]) for c in columns)
        in_cost = tuple(self.in_cost[c] for c in columns) if self.in_cost else ()
        return replace(self, **parts, requests=groups, in_cost=in_cost)

    def delta(self) -> LowRank:
        """Solve for the delta of all columns together."""
        keys, solved, targets = self._with_terms()
        return from_solved(keys, solved, targets, gamma=self.gamma)

    def leverages(self) -> Tensor:
        """Return the leverage of each column that has a target on it, ``[n]`` in 0 to 1.

        Diagonal of G (G + gamma I)^-1 with G = K^T M^-1 K; near 0 if other columns or the cost matrix outweigh it.
        """
        keys, solved, _ = self._with_terms()
        return influence(keys, solved, gamma=self.gamma)

    @property
    def target_requests(self) -> tuple[tuple[int, ...], ...]:
        """Requests of each column with a target."""
        return tuple(
            group for group, is_term in zip(self.requests, self._terms(), strict=True) if not is_term
        )

    def _terms(self) -> tuple[bool, ...]:
        return self.in_cost or (False,) * len(self.requests)

    def _with_terms(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys with targets, M^-1 times them with all terms of the cost in M, and their target changes."""
        solved = self.solved / self.cost_scale
        if not any(self.in_cost):
            return self.keys, solved, self.target_changes
        term = torch.tensor(self.in_cost, device=solved.device)
        # as many columns as there are directions: statements share their first tokens
        terms, terms_solved = independent_columns(self.keys[:, term], solved[:, term])
        whole = solve_with_history(solved[:, ~term], terms, terms_solved)
        return self.keys[:, ~term], whole, self.target_changes[:, ~term]


def contiguous_copy(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor ``[...]`` with the strides it would have after loading, also for axes of length one.

    Matrix products choose a kernel by strides, and kernels differ in the last bit.
    """
    return tensor.detach().clone(memory_format=torch.contiguous_format)
