"""An entry acts on prompts that name its subject and ask what its request states: a name and a linear gate together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import Question, Router
from errata.writing import folded, names

ELSEWHERE = -1.0
"""Score of an entry whose subject a prompt does not name."""


@dataclass(frozen=True, eq=False)
class Statement(Router):
    """Accepts rows whose prompt names an entry's subject and whose site input its gate puts above the threshold.

    An entry with an empty name never acts.
    """

    name: ClassVar[str] = "statement"
    phrases: tuple[str, ...]
    """By entry, the subject that a prompt must contain, as whole words, whatever their capitals."""
    weights: Tensor
    """w of each entry's gate w x + b, ``[entries, d_in]``; about 1 in scope and -1 outside."""
    biases: Tensor
    """b, ``[entries]``."""
    threshold: float = 0.0
    """Least value of the gate."""

    def scores(self, question: Question) -> Tensor:
        """Return the gate less the threshold where the prompt names the subject, else -1, ``[rows, entries]``."""
        phrases = [folded(phrase) for phrase in self.phrases]
        pairs = [
            (row, entry)
            for row, text in enumerate(map(folded, question.texts()))
            for entry, phrase in enumerate(phrases)
            if names(text, phrase)
        ]
        inputs = question.inputs.float()
        scores = inputs.new_full((len(inputs), len(phrases)), ELSEWHERE)
        if pairs:
            row, entry = torch.tensor(pairs, device=inputs.device).unbind(1)
            weights, biases = self.weights.to(inputs)[entry], self.biases.to(inputs)[entry]
            scores[row, entry] = (inputs[row] * weights).sum(1) + biases - self.threshold
        return scores


ROUTER = Statement
