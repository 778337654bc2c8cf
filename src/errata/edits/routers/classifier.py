"""A learned scope classifier: how near a prompt's sentence vector is to an entry's, once a trained map is applied.

Source     Mitchell et al., "Memory-Based Model Editing at Scale", ICML 2022, arXiv 2206.06520, Sec. 3.2
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.index import VectorIndex, compare
from errata.edits.routers._router import NONE, Question, Reading, Router


@dataclass(frozen=True, eq=False)
class Classifier(Router):
    """Accepts rows that are in an entry's scope with a probability exp(-|P e - P q|^2) above the threshold.

    e and q are sentence vectors of :func:`errata.host.embedding.embed`, P a trained projection.
    """

    name: ClassVar[str] = "classifier"
    reads: ClassVar[frozenset[Reading]] = frozenset({"vectors"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("keys",)
    keys: Tensor
    """P e of each entry ``[entries, k]``."""
    projection: Tensor
    """P ``[k, d]``."""
    threshold: float = 0.5
    """Least probability."""
    encoder: str | None = None
    """Name or folder of the sentence encoder; None: the host's own hidden states."""
    encoder_digest: str = ""
    """Checksum of the encoder's files; an encoder with another one is refused. Empty: the host itself."""

    @cached_property
    def index(self) -> VectorIndex:
        """The keys, for searches."""
        return VectorIndex(self.keys.float(), "distance")

    def scores(self, question: Question) -> Tensor:
        """Return probability less threshold ``[rows, entries]``."""
        queries = self._project(question)
        distances = compare(self.keys.to(queries), queries, "distance")
        return torch.exp(-distances.square()) - self.threshold

    def decide(self, question: Question) -> Tensor:
        """Return the most probable entry, int64 ``[rows]``, where its probability exceeds the threshold."""
        queries = self._project(question)
        if not len(self.keys):
            return torch.full((len(queries),), NONE, device=queries.device)
        distance, entry = self.index.nearest(queries)
        return torch.where(torch.exp(-distance.square()) > self.threshold, entry, NONE)

    def _project(self, question: Question) -> Tensor:
        vectors = question.vectors().float()
        return vectors @ self.projection.to(vectors).mT


ROUTER = Classifier
