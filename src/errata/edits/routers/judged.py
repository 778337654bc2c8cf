"""An entry acts where the model itself finds that a condition holds for the prompt: a question, answered yes or no.

Source     Murty et al., "Fixing Model Bugs with Natural Language Patches", EMNLP 2022, arXiv 2211.03318: the gate
           g(x, c) of a condition c for an input x, and of several the one with the highest gate
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import NONE, Question, Reading, Router
from errata.writing import filled


@dataclass(frozen=True, eq=False)
class Judged(Router):
    """Accepts rows for whose prompt the probability that a condition holds exceeds the threshold.

    Of several conditions the most probable one acts, of equal ones the newest.
    """

    name: ClassVar[str] = "judged"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text", "preference"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("conditions",)
    conditions: tuple[str, ...]
    """By entry, what has to hold for a prompt."""
    question: str
    """What the model is asked; ``{condition}`` and ``{prompt}`` are filled in."""
    yes: str = "yes"
    """The answer that the condition holds."""
    no: str = "no"
    """The answer that it does not."""
    threshold: float = 0.5
    """Least probability of ``yes`` against ``no``."""

    def scores(self, question: Question) -> Tensor:
        """Return probability less threshold, float32 ``[rows, entries]``."""
        texts = question.texts()
        asked = [
            filled(self.question, condition=condition, prompt=text)
            for text in texts
            for condition in self.conditions
        ]
        probabilities = question.preference(asked, self.yes, self.no) if asked else torch.zeros(0)
        return probabilities.reshape(len(texts), len(self.conditions)) - self.threshold

    def decide(self, question: Question) -> Tensor:
        """Return the entry of the most probable condition of those above the threshold, int64 ``[rows]``."""
        scores = self.scores(question)
        if not scores.shape[1]:
            return torch.full((len(scores),), NONE, device=scores.device)
        best, entry = scores.flip(1).max(1)
        return torch.where(best > 0, scores.shape[1] - 1 - entry, NONE)


ROUTER = Judged
