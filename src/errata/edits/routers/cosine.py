"""The entry whose key points most nearly where a row's site input points, above a threshold (retrieval)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from errata.edits.routers._router import Question, Router


@dataclass(frozen=True, eq=False)
class Cosine(Router):
    """Accepts rows whose cosine with a key exceeds the threshold."""

    name: ClassVar[str] = "cosine"
    keys: Tensor
    """``[entries, d_in]``."""
    threshold: float = 0.5
    """Least cosine, -1 to 1."""

    def scores(self, question: Question) -> Tensor:
        """Return cosine less threshold ``[rows, entries]``."""
        keys = functional.normalize(self.keys.to(question.inputs.device, torch.float32), dim=1)
        return functional.normalize(question.inputs.float(), dim=1) @ keys.mT - self.threshold


ROUTER = Cosine
