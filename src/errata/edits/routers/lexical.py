"""An entry acts on prompts that name it: its subject, whole words, whatever their capitals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.names import NameTable
from errata.edits.routers._router import NONE, Question, Reading, Router


@dataclass(frozen=True, eq=False)
class Lexical(Router):
    """Accepts rows whose prompt names an entry; of several the longest name, of equal ones the newest entry."""

    name: ClassVar[str] = "lexical"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("phrases",)
    phrases: tuple[str, ...]
    """By entry, the name that a prompt must contain."""

    @cached_property
    def table(self) -> NameTable:
        """The names, for lookups."""
        return NameTable(self.phrases)

    def scores(self, question: Question) -> Tensor:
        """Return the length of the name where the prompt contains it, else 0, ``[rows, entries]``."""
        texts = question.texts()
        scores = torch.zeros(len(texts), len(self.phrases), device=question.inputs.device)
        for row, text in enumerate(texts):
            for entry in self.table.named(text):
                scores[row, entry] = self.table.length(entry) + (entry + 1) / (len(self.phrases) + 1)
        return scores

    def decide(self, question: Question) -> Tensor:
        """Return the entry that acts on each row, int64 ``[rows]``; without a table of all scores."""
        best = [
            max(self.table.named(text), key=lambda entry: (self.table.length(entry), entry), default=NONE)
            for text in question.texts()
        ]
        return torch.tensor(best, dtype=torch.int64, device=question.inputs.device)


ROUTER = Lexical
