"""The entry whose sentence vector is most similar to the prompt's, above a threshold (retrieval of texts)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.edits.index import VectorIndex
from errata.edits.routers._router import NONE, Question, Reading, Router, best_of_blocks, renumbered


@dataclass(frozen=True, eq=False)
class Similarity(Router):
    """Accepts rows whose sentence vector has a cosine with an entry's that exceeds the threshold.

    The vectors are those of :func:`errata.host.embedding.embed`: of a sentence encoder, or of the host itself.
    """

    name: ClassVar[str] = "similarity"
    reads: ClassVar[frozenset[Reading]] = frozenset({"vectors"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("keys",)
    keys: Tensor
    """Sentence vectors of unit length ``[vectors, d]``."""
    threshold: float = 0.5
    """Least cosine, -1 to 1."""
    encoder: str | None = None
    """Name or folder of the sentence encoder; None: the host's own hidden states."""
    encoder_digest: str = ""
    """Checksum of the encoder's files; an encoder with another one is refused. Empty: the host itself."""
    blocks: Tensor | None = None
    """Entry that each vector leads to, int64 ``[vectors]``, where several lead to one; None: each to its own."""

    @cached_property
    def index(self) -> VectorIndex:
        """The vectors, for searches."""
        return VectorIndex(self.keys.float(), "product")

    def scores(self, question: Question) -> Tensor:
        """Return cosine less threshold ``[rows, entries]``."""
        vectors = question.vectors()
        scores = vectors @ self.keys.to(vectors).mT - self.threshold
        return scores if self.blocks is None else best_of_blocks(scores, self.blocks)

    def decide(self, question: Question) -> Tensor:
        """Return the entry of the most similar vector, int64 ``[rows]``, where its cosine exceeds the threshold."""
        vectors = question.vectors()
        if not len(self.keys):
            return torch.full((len(vectors),), NONE, device=vectors.device)
        cosine, entry = self.index.nearest(vectors)
        entry = entry if self.blocks is None else self.blocks.to(entry.device)[entry]
        return torch.where(cosine > self.threshold, entry, NONE)

    def without(self, blocks: Sequence[int]) -> Router:
        """Return the router without some blocks and the vectors that lead to them."""
        if self.blocks is None:
            return super().without(blocks)
        stays = ~torch.isin(self.blocks, torch.tensor(list(blocks)))
        return replace(self, keys=self.keys[stays], blocks=renumbered(self.blocks[stays], blocks))

    def facts(self) -> dict[str, Any]:
        """Return everything but tensors, as plain data; without ``blocks``, which edits of one entry a vector lack."""
        return {name: value for name, value in super().facts().items() if name != "blocks"}


ROUTER = Similarity
