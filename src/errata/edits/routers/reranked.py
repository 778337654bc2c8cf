"""Several entries for a row: those with the highest BM25, ordered by the product of mean word embeddings (Kformer).

Source     Yao et al., "Kformer: Knowledge Injection in Transformer Feed-Forward Layers", NLPCC 2022, arXiv 2201.05742
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import NONE, Question, Reading, Router
from errata.edits.routers.fulltext import FullText


@dataclass(frozen=True, eq=False)
class Reranked(Router):
    """Accepts rows whose prompt shares a word with an entry; of the nearest by words, the nearest by vectors act.

    A memory with this router reads the module that embeds tokens, so that a prompt's vector is the mean of its word
    embeddings. The softmax that the authors take of the products keeps their order, and is left out.
    """

    name: ClassVar[str] = "reranked"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text", "vectors"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("passages", "vectors")
    several: ClassVar[bool] = True
    passages: tuple[str, ...]
    """By entry, the text that prompts are compared with."""
    vectors: Tensor
    """By entry, the mean word embedding of its text ``[entries, d]``."""
    most: int = 5
    """Entries that act on a row at most."""
    candidates: int = 20
    """Entries that are ordered by vectors: those with the highest BM25."""
    threshold: float = 0.0
    """BM25 that must be exceeded."""

    @cached_property
    def words(self) -> FullText:
        """The texts, compared by words alone."""
        return FullText(self.passages, self.threshold)

    def scores(self, question: Question) -> Tensor:
        """Return BM25 less the threshold for entries that share a word, else 0, ``[rows, entries]``."""
        return self.words.scores(question)

    def decide(self, question: Question) -> Tensor:
        """Return the entries that act on each row, the nearest first, int64 ``[rows, most]``."""
        scores = self.scores(question)
        decisions = torch.full((len(scores), self.most), NONE, device=scores.device)
        found = nearest_by_words(scores, self.candidates)
        if any(found):
            queries = question.vectors().float()
            for row, entries in enumerate(found):
                own = self.vectors[entries].to(queries)
                order = (own @ queries[row]).sort(descending=True, stable=True).indices[: self.most]
                chosen = torch.tensor(entries)[order.cpu()]
                decisions[row, : len(chosen)] = chosen.to(decisions.device)
        return decisions


def nearest_by_words(scores: Tensor, count: int) -> list[list[int]]:
    """Return for each row the entries with the highest scores above zero ``[rows, entries]``, the best first."""
    order = scores.sort(dim=1, descending=True, stable=True)
    kept = [int((row > 0).sum()) for row in order.values]
    return [
        list(map(int, entries[: min(count, n)])) for entries, n in zip(order.indices.cpu(), kept, strict=True)
    ]


ROUTER = Reranked
