"""Nearest vectors among very many: vectors in cells around centres, of which a search looks into the nearest ones.

An inverted file (Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011, Sec. IV) without
quantisation. Centres are found in two levels of k-means, so that building takes seconds for a million vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

CELL = 256
"""Vectors of a cell, about."""
NEAR_GROUPS = 8
"""Groups of centres among which a vector's cell is looked for."""
SAMPLE = 128
"""Vectors per centre that k-means looks at."""
ROUNDS = 5
"""Of k-means."""
COMPARED = 8192
"""Vectors that a search compares, about."""
LEAST_CELLS = 8
"""Cells that a search looks into, at least."""
CHECKED = 8
"""Best ones of those whose exact value decides."""
ROWS = 16_384
"""Rows of a product at a time."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Vectors in the order of their cells."""

    vectors: Tensor
    """float32 ``[n, d]``."""
    numbers: Tensor
    """Each one's place in the order given, int64 ``[n]``."""
    starts: tuple[int, ...]
    """First vector of each cell, and n."""
    centres: Tensor
    """float32 ``[cells, d]``; of unit length where products are searched for."""
    halves: Tensor | None
    """Half the squared length of each vector ``[n]`` where distances are searched for."""

    @staticmethod
    def of(vectors: Tensor, *, distance: bool) -> Cells:
        """Put vectors ``[n, d]`` into cells, for the least Euclidean distance or else the largest product.

        Products are found best among vectors of one length. The same vectors give the same cells.
        """
        vectors = vectors.float()
        generator = torch.Generator().manual_seed(0)
        groups = _centres(vectors, max(1, round((len(vectors) / CELL) ** 0.5)), distance, generator)
        near = _nearest(vectors, groups, distance, NEAR_GROUPS)  # [n, groups]
        centres, first = list[Tensor](), 0
        best, cell = torch.full((len(vectors),), -torch.inf), torch.zeros(len(vectors), dtype=torch.long)
        for group in range(len(groups)):
            own = vectors[near[:, 0] == group]
            if not len(own):
                continue
            centres.append(_centres(own, max(1, round(len(own) / CELL)), distance, generator))
            # a vector near the border of its group may be nearest to a centre of another
            for members in torch.split((near == group).any(1).nonzero()[:, 0], ROWS):
                score, place = _scores(vectors[members], centres[-1], distance).max(1)
                better = score > best[members]
                best[members[better]], cell[members[better]] = score[better], first + place[better]
            first += len(centres[-1])
        numbers, counts = cell.argsort(stable=True), cell.bincount(minlength=first)
        kept = counts > 0
        ordered = vectors[numbers]
        halves = ordered.square().sum(1) / 2 if distance else None
        starts = (0, *(int(stop) for stop in counts[kept].cumsum(0)))
        return Cells(ordered, numbers, starts, torch.cat(centres)[kept], halves)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.vectors, self.numbers, self.centres, self.halves)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def nearest(self, query: Tensor) -> tuple[float, int]:
        """Return the product with or distance from the nearest vector found, and its number; ``query`` ``[d]``."""
        near = self.centres @ query
        if self.halves is not None:
            near -= self.centres.square().sum(1) / 2
        parts, spans, compared = list[Tensor](), list[tuple[int, int]](), 0
        for cell in map(int, near.topk(min(len(near), COMPARED // LEAST_CELLS)).indices):
            start, stop = self.starts[cell : cell + 2]
            products = self.vectors[start:stop] @ query
            parts.append(products if self.halves is None else products - self.halves[start:stop])
            spans.append((start, stop))
            compared += stop - start
            if compared >= COMPARED and len(spans) >= LEAST_CELLS:
                break
        scores = torch.cat(parts)
        best = scores.topk(min(CHECKED, len(scores))).indices
        places = torch.cat([torch.arange(start, stop) for start, stop in spans])[best]
        chosen = self.vectors[places]
        # not the score: |a|^2 - 2ab + |b|^2 cancels where the query is a vector itself
        exact = chosen @ query if self.halves is None else -(chosen - query).square().sum(1).sqrt()
        value, number = exact.max(0)
        return abs(float(value)) if self.halves is not None else float(value), int(
            self.numbers[places[number]]
        )


def _centres(vectors: Tensor, count: int, distance: bool, generator: torch.Generator) -> Tensor:
    """Return centres of vectors by k-means on a sample ``[count, d]``."""
    sample = vectors[torch.randperm(len(vectors), generator=generator)[: SAMPLE * count]]
    centres = sample[:count].clone()
    for _ in range(ROUNDS):
        nearest = _nearest(sample, centres, distance, 1)[:, 0]
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        counts = nearest.bincount(minlength=len(centres))[:, None]
        means = sums / counts.clamp_min(1) if distance else functional.normalize(sums, dim=1)
        centres = torch.where(counts > 0, means, centres)
    return centres


def _nearest(vectors: Tensor, centres: Tensor, distance: bool, count: int) -> Tensor:
    """Return each vector's nearest centres, int64 ``[n, count]``, fewer where there are not so many."""
    count = min(count, len(centres))
    parts = [_scores(part, centres, distance).topk(count).indices for part in torch.split(vectors, ROWS)]
    return torch.cat(parts)


def _scores(vectors: Tensor, centres: Tensor, distance: bool) -> Tensor:
    """Return what is larger for a nearer centre ``[n, centres]``."""
    products = vectors @ centres.mT
    return products - centres.square().sum(1) / 2 if distance else products
