"""The entry whose key points most nearly where a row's site input points, above a threshold (retrieval)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from errata.edits.index import VectorIndex
from errata.edits.routers._router import NONE, Question, Router


@dataclass(frozen=True, eq=False)
class Cosine(Router):
    """Accepts rows whose cosine with a key exceeds the threshold."""

    name: ClassVar[str] = "cosine"
    per_entry: ClassVar[tuple[str, ...] | None] = ("keys",)
    keys: Tensor
    """``[entries, d_in]``."""
    threshold: float = 0.5
    """Least cosine, -1 to 1."""

    @cached_property
    def index(self) -> VectorIndex:
        """The keys at unit length."""
        return VectorIndex(functional.normalize(self.keys.float(), dim=1), "product")

    def scores(self, question: Question) -> Tensor:
        """Return cosine less threshold ``[rows, entries]``."""
        keys = functional.normalize(self.keys.to(question.inputs.device, torch.float32), dim=1)
        return functional.normalize(question.inputs.float(), dim=1) @ keys.mT - self.threshold

    def decide(self, question: Question) -> Tensor:
        """Return the entry of the nearest key, int64 ``[rows]``, where its cosine exceeds the threshold."""
        if not len(self.keys):
            return super().decide(question)
        cosine, entry = self.index.nearest(functional.normalize(question.inputs.float(), dim=1))
        return torch.where(cosine > self.threshold, entry, NONE)


ROUTER = Cosine
