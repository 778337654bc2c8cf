"""Points in clusters, each with the block that it leads to: many points share a block (MELO).

Source     Yu et al., "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA", AAAI 2024, arXiv 2312.11795
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.index import VectorIndex, compare
from errata.edits.routers._router import NONE, Question, Router, best_of_blocks, renumbered


@dataclass(frozen=True, eq=False)
class Clusters(Router):
    """Accepts rows whose site output lies within the radius of the nearest cluster; its nearest point gives the block.

    Distances are Euclidean, in float32. A point of block :data:`NONE` lets no block act.
    """

    name: ClassVar[str] = "clusters"
    centres: Tensor
    """``[clusters, d_out]``."""
    radii: Tensor
    """``[clusters]``."""
    points: Tensor
    """``[points, d_out]``."""
    owners: Tensor
    """Cluster of each point, int64 ``[points]``."""
    blocks: Tensor
    """Block of each point, an entry of the memory or NONE, int64 ``[points]``."""
    targets: Tensor
    """Ids of each cluster's target, filled with -1, int64 ``[clusters, tokens]``; nothing decides by them."""
    least: Tensor
    """Radius of each cluster when it had one point ``[clusters]``; nothing decides by it."""

    @cached_property
    def index(self) -> VectorIndex:
        """The centres, for searches."""
        return VectorIndex(self.centres.float(), "distance")

    def scores(self, question: Question) -> Tensor:
        """Return radius less distance for the nearest point's block, minus infinity for others ``[rows, blocks]``."""
        scores = question.outputs.new_full((len(question.outputs), len(self.points)), -torch.inf)
        if len(self.points):
            margin, point = self._nearest(question.outputs)
            scores.scatter_(1, point[:, None], margin[:, None])
        return best_of_blocks(scores, self.blocks)

    def decide(self, question: Question) -> Tensor:
        """Return the block of each row, int64 ``[rows]``; the border of a cluster is inside."""
        if not len(self.points):
            return torch.full((len(question.outputs),), NONE, device=question.outputs.device)
        margin, point = self._nearest(question.outputs)
        return torch.where(margin >= 0, self.blocks.to(point.device)[point], NONE)

    def without(self, blocks: Sequence[int]) -> Clusters:
        """Return the router without some blocks: their points go, and clusters without points; radii stay."""
        stays = ~torch.isin(self.blocks, torch.tensor(list(blocks)))
        clusters = torch.tensor(sorted({int(owner) for owner in self.owners[stays]}), dtype=torch.int64)
        return Clusters(
            self.centres[clusters], self.radii[clusters], self.points[stays],
            torch.searchsorted(clusters, self.owners[stays]), renumbered(self.blocks[stays], blocks),
            self.targets[clusters], self.least[clusters],
        )  # fmt: skip

    def _nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return how far each query is inside its nearest cluster ``[rows]``, and the cluster's nearest point."""
        distance, cluster = self.index.nearest(queries)
        gaps = compare(self.points.to(queries.device, torch.float32), queries, "distance")  # [rows, points]
        elsewhere = self.owners.to(queries.device)[None] != cluster[:, None]
        point = gaps.masked_fill(elsewhere, torch.inf).argmin(1)
        return self.radii.to(distance)[cluster] - distance, point


ROUTER = Clusters
