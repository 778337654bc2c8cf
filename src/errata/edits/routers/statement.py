"""An entry acts on prompts that name its subject and ask what its request states: a name and a linear gate together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.names import NameTable
from errata.edits.routers._router import NONE, Question, Reading, Router

ELSEWHERE = -1.0
"""Score of an entry whose subject a prompt does not name."""


@dataclass(frozen=True, eq=False)
class Statement(Router):
    """Accepts rows whose prompt names an entry's subject and whose site input its gate puts above the threshold.

    An entry with an empty name never acts.
    """

    name: ClassVar[str] = "statement"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text", "states"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("phrases", "weights", "biases")
    phrases: tuple[str, ...]
    """By entry, the subject that a prompt must contain, as whole words, whatever their capitals."""
    weights: Tensor
    """w of each entry's gate w x + b, ``[entries, d_in]``; about 1 in scope and -1 outside."""
    biases: Tensor
    """b, ``[entries]``."""
    threshold: float = 0.0
    """Least value of the gate."""

    @cached_property
    def table(self) -> NameTable:
        """The subjects, for lookups."""
        return NameTable(self.phrases)

    def scores(self, question: Question) -> Tensor:
        """Return the gate less the threshold where the prompt names the subject, else -1, ``[rows, entries]``."""
        named = self._named(question)
        scores = question.inputs.new_full((len(named), len(self.phrases)), ELSEWHERE, dtype=torch.float32)
        for row, entries in enumerate(named):
            if entries:
                scores[row, entries] = self._gates(question, row, entries)
        return scores

    def decide(self, question: Question) -> Tensor:
        """Return the entry that acts on each row, int64 ``[rows]``; the gates of subjects that it names alone."""
        decisions = torch.full((len(question.inputs),), NONE, device=question.inputs.device)
        for row, entries in enumerate(self._named(question)):
            if entries:
                gates = self._gates(question, row, entries)
                best = int(gates.argmax())
                if float(gates[best]) > 0:
                    decisions[row] = entries[best]
        return decisions

    def _named(self, question: Question) -> list[list[int]]:
        """Return for each row the entries whose subject its prompt names."""
        return [self.table.named(text) for text in question.texts()]

    def _gates(self, question: Question, row: int, entries: list[int]) -> Tensor:
        """Return the gates of some entries for a row, less the threshold ``[n]``."""
        inputs = question.inputs[row].float()
        weights, biases = self.weights[entries].to(inputs), self.biases[entries].to(inputs)
        return (inputs * weights).sum(1) + biases - self.threshold


ROUTER = Statement
