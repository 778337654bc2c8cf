"""What all routers have in common: they decide once a row, at the end of its prompt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from errata.edits.header import is_list
from errata.edits.records import contiguous_copy
from errata.errors import EditError

Reading = Literal["text", "states", "vectors", "preference", "pairs"]
"""What a router decides by: a prompt's text, a site's input and output at its end, its sentence vector, which of two
answers the model prefers, what a model makes of a fact and the prompt together."""

NONE = -1
"""The decision that no entry acts."""


def _no_vectors() -> Tensor:
    raise EditError("this router compares sentence vectors, and none are at hand here")


def best_of_blocks(scores: Tensor, blocks: Tensor) -> Tensor:
    """Return the best score of the keys that lead to each block ``[rows, blocks]``, from all keys' ``[rows, keys]``.

    ``blocks``: of each key, int64 ``[keys]``; NONE: no block.
    """
    count = int(blocks.max()) + 1 if blocks.numel() else 0
    best = scores.new_full((len(scores), count), -torch.inf)
    leading = (blocks != NONE).to(scores.device)
    index = blocks.to(scores.device)[leading].expand(len(scores), -1)
    return best.scatter_reduce(1, index, scores[:, leading], "amax")


def renumbered(blocks: Tensor, dropped: Sequence[int]) -> Tensor:
    """Return the numbers of blocks, int64 ``[n]``, that they have once some others are dropped; NONE stays."""
    gone = torch.tensor(sorted(dropped), dtype=torch.int64)
    return blocks - torch.searchsorted(gone, blocks.contiguous())


def _no_preference(prompts: Sequence[str], first: str, second: str) -> Tensor:
    raise EditError(
        "this router asks the model about prompts, which interventions at sites cannot; use it with texts, on a host"
    )


def _no_pairs(facts: Sequence[str], prompts: Sequence[str]) -> Tensor:
    raise EditError(
        "this router has a model read facts and prompts together, which interventions at sites cannot; use it with "
        "texts, on a host"
    )


@dataclass(frozen=True, eq=False)
class Question:
    """What a router may look at to decide about rows."""

    inputs: Tensor
    """The site's input at each row's last prompt token, float32 ``[rows, d_in]``."""
    outputs: Tensor
    """The site's output there, float32 ``[rows, d_out]``."""
    texts: Callable[[], Sequence[str]]
    """Returns the rows' prompts."""
    vectors: Callable[[], Tensor] = _no_vectors
    """Returns the prompts' sentence vectors, unit length ``[rows, d]``: by the router's own encoder, or in a memory
    the site's mean output over a prompt."""
    preference: Callable[[Sequence[str], str, str], Tensor] = _no_preference
    """Returns the model's probability of the first of two answers to each of some texts, float32 ``[n]``."""
    pairs: Callable[[Sequence[str], Sequence[str]], Tensor] = _no_pairs
    """Returns what is read of pairs of a fact and a prompt, float32 ``[n, d]``, see :mod:`errata.host.pairs`."""


@dataclass(frozen=True)
class Calibration:
    """How a threshold does on prompts in scope and out of it."""

    threshold: float
    accepted_in_scope: float
    """Share of prompts in scope that the router accepts."""
    accepted_out_of_scope: float
    """Share of prompts out of scope that it accepts."""


@dataclass(frozen=True, eq=False)
class Router(ABC):
    """Decides which entry of a memory acts on a row. Frozen; tensors are fields, all else is plain data."""

    name: ClassVar[str]
    reads: ClassVar[frozenset[Reading]] = frozenset({"states"})
    per_entry: ClassVar[tuple[str, ...] | None] = None
    """Fields whose first axis, or whose items, are the entries; None: entries cannot be told apart."""
    several: ClassVar[bool] = False
    """Whether several entries may act on a row: decisions are then int64 ``[rows, k]``, filled up with :data:`NONE`."""

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            object.__setattr__(self, name, contiguous_copy(tensor))

    def __deepcopy__(self, memo: dict[int, Any]) -> Router:
        return self  # frozen; what it keeps to look entries up may not be copied

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @abstractmethod
    def scores(self, question: Question) -> Tensor:
        """Return how well each entry fits each row, float32 ``[rows, entries]``; above zero an entry may act."""

    def decide(self, question: Question) -> Tensor:
        """Return the entry that acts on each row, int64 ``[rows]``, :data:`NONE` where none does."""
        scores = self.scores(question)
        if not scores.shape[1]:
            return torch.full((len(scores),), NONE, device=scores.device)
        best, entry = scores.max(1)
        return torch.where(best > 0, entry, NONE)

    def calibrate(
        self, in_scope: Question, out_of_scope: Question, *, most_false: float = 0.05
    ) -> tuple[Router, Calibration]:
        """Return the router with a threshold that accepts at most a share of the prompts out of scope, and its costs.

        Raises ValueError for a router without a threshold or entries, and without prompts of both sorts.
        """
        names = {field.name for field in fields(self)}
        if "threshold" not in names:
            raise ValueError(f"a {self.name} router has no threshold to calibrate")
        own = float(vars(self)["threshold"])
        scores = [self.scores(question) for question in (in_scope, out_of_scope)]
        if not all(part.numel() for part in scores):
            raise ValueError("expected at least one entry, one prompt in scope and one out of scope")
        inside, outside = (part.amax(1) + own for part in scores)
        allowed = int(most_false * len(outside))
        bound = float(outside.sort(descending=True).values[min(allowed, len(outside) - 1)])
        calibrated = replace(self, threshold=bound)
        share_in, share_out = float((inside > bound).float().mean()), float((outside > bound).float().mean())
        return calibrated, Calibration(bound, share_in, share_out)

    def select(self, entries: Sequence[int]) -> Router:
        """Return the router of some entries, in the order of their numbers here.

        Raises EditError for a router that does not tell its entries apart.
        """
        if self.per_entry is None:
            raise EditError(f"a {self.name} router does not tell its entries apart")
        chosen: dict[str, Any] = {}
        for name in self.per_entry:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                chosen[name] = value[torch.tensor(list(entries), dtype=torch.long)]
            elif value is not None:
                chosen[name] = tuple(value[i] for i in entries)
        return replace(self, **chosen)

    def without(self, blocks: Sequence[int]) -> Router:
        """Return the router without some blocks, the others renumbered. Raises EditError where it leads to none."""
        raise EditError(f"a {self.name} router leads to no blocks that could be dropped")

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors ``[entries, ...]``, by field."""
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}

    def facts(self) -> dict[str, Any]:
        """Return everything else, as plain data."""
        return {f.name: v for f in fields(self) if not isinstance(v := getattr(self, f.name), Tensor)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Router:
        """Build a router from :meth:`tensors` ``[entries, ...]`` and :meth:`facts`. Raises TypeError or ValueError."""
        values = {**tensors, **{name: tuple(v) if is_list(v) else v for name, v in facts.items()}}
        return cls(**values)
