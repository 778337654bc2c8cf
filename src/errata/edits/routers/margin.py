"""A row is in scope where a side memory answers it far from how the weight itself does (WISE).

Source     Wang et al., "WISE: Rethinking the Knowledge Memory for Lifelong Model Editing", NeurIPS 2024,
           arXiv 2405.14768, Eq. 2: the norm of (W' - W) a, for an input a, against a threshold
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import NONE, Question, Router
from errata.linalg.routines import norm


@dataclass(frozen=True, eq=False)
class Margin(Router):
    """Accepts rows on which a side memory's change of the output is longer than the threshold."""

    name: ClassVar[str] = "margin"
    per_entry: ClassVar[tuple[str, ...] | None] = ("changes", "thresholds")
    changes: Tensor
    """W' - W of each entry, ``[entries, d_out, d_in]``."""
    threshold: float = 0.0
    """Least norm of the change, in the unit of the site's output."""
    thresholds: Tensor | None = None
    """Least norm for each entry ``[entries]``, in place of ``threshold``; of several the longest change acts."""

    def scores(self, question: Question) -> Tensor:
        """Return the change's norm less the threshold ``[rows, entries]``."""
        lengths = self._lengths(question)
        return lengths - (self.threshold if self.thresholds is None else self.thresholds.to(lengths))

    def decide(self, question: Question) -> Tensor:
        """Return the entry of the longest change of those above their thresholds, int64 ``[rows]``."""
        if self.thresholds is None or not len(self.changes):
            return super().decide(question)
        lengths = self._lengths(question)
        accepted = lengths > self.thresholds.to(lengths)
        entry = torch.where(accepted, lengths, -1.0).argmax(1)
        return torch.where(accepted.any(1), entry, NONE)

    def _lengths(self, question: Question) -> Tensor:
        """Return the norm of each entry's change of each row's output ``[rows, entries]``."""
        inputs = question.inputs.float()
        moved = torch.einsum("eoi,ri->reo", self.changes.to(inputs), inputs)  # [rows, entries, d_out]
        return norm(moved, 2)


ROUTER = Margin
