"""An entry acts on rows within its radius of its key, the nearest entry first (GRACE, MELO).

Source     Hartvigsen et al., "Aging with GRACE", NeurIPS 2023, arXiv 2211.11031, Eq. 1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.index import VectorIndex, compare
from errata.edits.routers._router import NONE, Question, Router


@dataclass(frozen=True, eq=False)
class Radius(Router):
    """Accepts rows whose site input lies within an entry's radius, Euclidean, in float32."""

    name: ClassVar[str] = "radius"
    per_entry: ClassVar[tuple[str, ...] | None] = ("keys", "radii")
    keys: Tensor
    """``[entries, d_in]``."""
    radii: Tensor
    """``[entries]``."""

    @cached_property
    def index(self) -> VectorIndex:
        """The keys, for searches."""
        return VectorIndex(self.keys.float(), "distance")

    def scores(self, question: Question) -> Tensor:
        """Return radius less distance ``[rows, entries]``."""
        keys = self.keys.to(question.inputs.device, torch.float32)
        distances = compare(keys, question.inputs, "distance")
        return self.radii.to(distances) - distances

    def decide(self, question: Question) -> Tensor:
        """Return the nearest entry, int64 ``[rows]``, where the row is inside its radius, the border included."""
        if not len(self.keys):
            return torch.full((len(question.inputs),), NONE, device=question.inputs.device)
        distance, entry = self.index.nearest(question.inputs)
        return torch.where(distance <= self.radii.to(distance)[entry], entry, NONE)


ROUTER = Radius
