"""Several entries for each row: those whose keys have the largest inner products with its query (PlugLM).

Source     Cheng et al., "Decouple Knowledge from Parameters for Plug-and-Play Language Modeling", Findings of ACL 2023,
           arXiv 2305.11564
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import NONE, Question, Router


@dataclass(frozen=True, eq=False)
class TopRows(Router):
    """Accepts every row: there is no threshold, and what is attended to decides how much an entry says.

    Queries are what an intervention of operation ``attend`` makes of its module's input, not that input itself.
    """

    name: ClassVar[str] = "top_rows"
    per_entry: ClassVar[tuple[str, ...] | None] = ("keys",)
    keys: Tensor
    """``[entries, width]``."""
    count: int = 5
    """Entries for each row at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keys.ndim != 2 or self.count < 1:
            raise ValueError(
                f"expected keys [entries, width] and a count of 1 or more, found keys of shape "
                f"{list(self.keys.shape)} and a count of {self.count}"
            )

    def scores(self, question: Question) -> Tensor:
        """Return inner products of keys and queries ``[rows, entries]``; the queries are the question's inputs."""
        return self._products(question.inputs)

    def decide(self, question: Question) -> Tensor:
        """Return the first entry of each row, int64 ``[rows]``; NONE without entries."""
        entries, _ = self.top(question.inputs)
        if not entries.shape[1]:
            return torch.full((len(entries),), NONE, device=entries.device)
        return entries[:, 0]

    def top(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return each row's entries, the best first, int64 ``[rows, n]``, and their cosines, float32 ``[rows, n]``.

        ``queries`` ``[rows, width]``; n is the count, or the number of entries where that is less. The search is exact.
        """
        products = self._products(queries)
        best = products.topk(min(self.count, len(self.keys)), dim=1)
        keys, queries = (part.to(queries.device, torch.float32) for part in (self.keys, queries))
        squares = keys.square().sum(1)[best.indices] * queries.square().sum(1, keepdim=True)
        return best.indices, best.values / squares.sqrt().clamp_min(1e-12)

    def _products(self, queries: Tensor) -> Tensor:
        return queries.float() @ self.keys.to(queries.device, torch.float32).mT


ROUTER = TopRows
