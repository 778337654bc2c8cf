"""Every row is in scope of every entry: what several have learnt acts together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import Question, Reading, Router


@dataclass(frozen=True, eq=False)
class Every(Router):
    """Accepts every row, for all entries."""

    name: ClassVar[str] = "every"
    reads: ClassVar[frozenset[Reading]] = frozenset()
    several: ClassVar[bool] = True
    entries: int
    """How many there are."""

    def scores(self, question: Question) -> Tensor:
        """Return 1 for every entry ``[rows, entries]``."""
        return torch.ones(len(question.inputs), self.entries, device=question.inputs.device)

    def decide(self, question: Question) -> Tensor:
        """Return all entries for each row, int64 ``[rows, entries]``."""
        entries = torch.arange(self.entries, device=question.inputs.device)
        return entries.expand(len(question.inputs), -1)

    def select(self, entries: Sequence[int]) -> Every:
        """Return the router of some entries."""
        return replace(self, entries=len(entries))

    def without(self, blocks: Sequence[int]) -> Every:
        """Return the router without some entries."""
        return replace(self, entries=self.entries - len(set(blocks)))


ROUTER = Every
