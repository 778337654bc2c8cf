"""An entry acts on rows within its radius of its key, the nearest entry first (GRACE, MELO).

Source     Hartvigsen et al., "Aging with GRACE", NeurIPS 2023, arXiv 2211.11031, Eq. 1
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import NONE, Question, Router


@dataclass(frozen=True, eq=False)
class Radius(Router):
    """Accepts rows whose site input lies within an entry's radius, Euclidean, in float32."""

    name: ClassVar[str] = "radius"
    keys: Tensor
    """``[entries, d_in]``."""
    radii: Tensor
    """``[entries]``."""

    def distances(self, inputs: Tensor) -> Tensor:
        """Return the distance of each row from each key ``[rows, entries]``."""
        keys = self.keys.to(inputs.device, torch.float32)
        # not the expanded form |a|^2 - 2ab + |b|^2, which cancels where a row is a key itself
        return torch.cdist(inputs.float(), keys, compute_mode="donot_use_mm_for_euclid_dist")

    def scores(self, question: Question) -> Tensor:
        """Return radius less distance ``[rows, entries]``."""
        distances = self.distances(question.inputs)
        return self.radii.to(distances) - distances

    def decide(self, question: Question) -> Tensor:
        """Return the nearest entry, int64 ``[rows]``, where the row is inside its radius, the border included."""
        distances = self.distances(question.inputs)
        if not distances.shape[1]:
            return torch.full((len(distances),), NONE, device=distances.device)
        least, entry = distances.min(1)
        return torch.where(least <= self.radii.to(distances)[entry], entry, NONE)


ROUTER = Radius
