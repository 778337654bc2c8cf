"""A vector database of clusters that grows request by request: the rules of MELO, for the router `clusters`.

Source     Yu et al., "MELO: Enhancing Model Editing with Neuron-Indexed Dynamic LoRA", AAAI 2024, arXiv 2312.11795
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.edits.memory import MemoryEdit
from errata.edits.routers._router import NONE
from errata.edits.routers.clusters import Clusters

BORDER = 1e-5
"""How much a split leaves between two clusters on each side (authors' code); of long queries, the share of their norm.
Queries that are no further apart are one."""
SLACK = 1e-4
"""Share by which a radius exceeds the distance of the furthest point, which rounding may not put outside."""


@dataclass
class Cluster:
    """Points with one target."""

    centre: Tensor
    """``[d]``."""
    radius: float
    least: float
    """Its radius when it had one point."""
    target: tuple[int, ...]
    points: list[Tensor]
    """Each ``[d]``."""
    blocks: list[int]
    """Block of each point; NONE: no block acts."""

    def join(self, point: Tensor, block: int) -> None:
        """Take a point ``[d]`` in; the cluster then reaches all its points."""
        self.points.append(point)
        self.blocks.append(block)
        self.centre = torch.stack(self.points).mean(0)
        furthest = max(float((one - self.centre).norm()) for one in self.points)
        self.radius = max(self.least, furthest * (1 + SLACK))

    def shrink(self, radius: float) -> int:
        """Forget the points outside a smaller radius and return how many; where none remain, no block acts inside."""
        self.radius = radius
        inside = [i for i, one in enumerate(self.points) if float((one - self.centre).norm()) <= radius]
        forgotten = len(self.points) - len(inside)
        self.points = [self.points[i] for i in inside] or [self.centre]
        self.blocks = [self.blocks[i] for i in inside] or [NONE]
        return forgotten


@dataclass
class ClusterDatabase:
    """The clusters, and what each request did to them."""

    clusters: list[Cluster] = field(default_factory=list[Cluster])
    log: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def enter(self, request: int, query: Tensor, target: tuple[int, ...], block: int, radius: float) -> None:
        """Enter a request's query ``[d]``, which leads to a block; ``radius``: of a new cluster."""
        number, distance = self._nearest(query)
        border = BORDER * max(1.0, float(query.norm()))
        near = None if number is None else self.clusters[number]
        entry: dict[str, Any] = {"request": request, "block": block, "action": "add"}
        if near is not None:
            entry |= {"distance": distance, "radius": near.radius}
        if near is None or distance > near.radius + radius:
            self._add(query, radius, radius, target, block)
        elif near.target == target:
            entry["action"] = "join"
            near.join(query, block)
        elif distance <= 2 * border:
            entry["action"] = "replace"
            near.centre, near.target, near.points, near.blocks = query, target, [query], [block]
        else:
            entry |= {"action": "split", "forgotten": near.shrink(distance / 2 - border)}
            self._add(query, distance / 2 + border, radius, target, block)
        self.log.append(entry)

    def _nearest(self, query: Tensor) -> tuple[int | None, float]:
        if not self.clusters:
            return None, float("inf")
        distances = (torch.stack([one.centre for one in self.clusters]) - query).norm(dim=1)
        return int(distances.argmin()), float(distances.min())

    def _add(self, query: Tensor, radius: float, least: float, target: tuple[int, ...], block: int) -> None:
        self.clusters.append(Cluster(query, radius, least, target, [query], [block]))

    def router(self) -> Clusters:
        """Return what decides which block a prompt takes, with all that is needed to go on."""
        clusters = self.clusters
        longest = max(len(one.target) for one in clusters)
        return Clusters(
            torch.stack([one.centre for one in clusters]),
            torch.tensor([one.radius for one in clusters], dtype=torch.float32),
            torch.stack([point for one in clusters for point in one.points]),
            torch.tensor([i for i, one in enumerate(clusters) for _ in one.points]),
            torch.tensor([block for one in clusters for block in one.blocks]),
            torch.tensor([[*one.target, *[-1] * (longest - len(one.target))] for one in clusters]),
            torch.tensor([one.least for one in clusters], dtype=torch.float32),
        )

    @staticmethod
    def of(edit: MemoryEdit | None) -> ClusterDatabase:
        """Return the database of an edit, or an empty one."""
        if edit is None:
            return ClusterDatabase()
        router = edit.router
        assert isinstance(router, Clusters)
        clusters: list[Cluster] = []
        for i, row in enumerate(router.targets.tolist()):
            own = (router.owners == i).nonzero()[:, 0].tolist()
            target = tuple(token for token in row if token >= 0)
            points, blocks = [router.points[k] for k in own], [int(router.blocks[k]) for k in own]
            radii = float(router.radii[i]), float(router.least[i])
            clusters.append(Cluster(router.centres[i], *radii, target, points, blocks))
        return ClusterDatabase(clusters, [dict(entry) for entry in edit.log])
