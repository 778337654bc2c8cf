"""A linear gate per entry on a row's site input (DEFER; T-Patcher's neurons are such gates implicitly).

Source     Hartvigsen et al., "Aging with GRACE", NeurIPS 2023, arXiv 2211.11031, baseline DEFER
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import Question, Router


@dataclass(frozen=True, eq=False)
class Gate(Router):
    """Accepts rows for which sigmoid(w h + b) exceeds the threshold."""

    name: ClassVar[str] = "gate"
    per_entry: ClassVar[tuple[str, ...] | None] = ("weights", "biases")
    weights: Tensor
    """w, ``[entries, d_in]``."""
    biases: Tensor
    """b, ``[entries]``."""
    threshold: float = 0.5
    """Least probability (paper: 0.5)."""

    def scores(self, question: Question) -> Tensor:
        """Return probability less threshold ``[rows, entries]``."""
        inputs = question.inputs.float()
        weights, biases = self.weights.to(inputs), self.biases.to(inputs)
        return torch.sigmoid(inputs @ weights.mT + biases) - self.threshold


ROUTER = Gate
