"""The entry whose sentence vector is most similar to the prompt's, above a threshold (retrieval of texts)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.index import VectorIndex
from errata.edits.routers._router import NONE, Question, Reading, Router


@dataclass(frozen=True, eq=False)
class Similarity(Router):
    """Accepts rows whose sentence vector has a cosine with an entry's that exceeds the threshold.

    The vectors are those of :func:`errata.host.embedding.embed`: of a sentence encoder, or of the host itself.
    """

    name: ClassVar[str] = "similarity"
    reads: ClassVar[frozenset[Reading]] = frozenset({"vectors"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("keys",)
    keys: Tensor
    """Sentence vectors of unit length ``[entries, d]``."""
    threshold: float = 0.5
    """Least cosine, -1 to 1."""
    encoder: str | None = None
    """Name or folder of the sentence encoder; None: the host's own hidden states."""
    encoder_digest: str = ""
    """Checksum of the encoder's files; an encoder with another one is refused. Empty: the host itself."""

    @cached_property
    def index(self) -> VectorIndex:
        """The vectors, for searches."""
        return VectorIndex(self.keys.float(), "product")

    def scores(self, question: Question) -> Tensor:
        """Return cosine less threshold ``[rows, entries]``."""
        vectors = question.vectors()
        return vectors @ self.keys.to(vectors).mT - self.threshold

    def decide(self, question: Question) -> Tensor:
        """Return the entry of the most similar vector, int64 ``[rows]``, where its cosine exceeds the threshold."""
        vectors = question.vectors()
        if not len(self.keys):
            return torch.full((len(vectors),), NONE, device=vectors.device)
        cosine, entry = self.index.nearest(vectors)
        return torch.where(cosine > self.threshold, entry, NONE)


ROUTER = Similarity
