"""Nearest vectors among very many: vectors in cells around centres, of which a search looks into the nearest ones.

An inverted file (Jegou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search", TPAMI 2011, Sec. IV). In
place of quantised vectors it holds sketches: the vectors along their few directions of most variance. A search is
bound by the memory it reads, and sketches are a fraction of it; the exact vectors of the best candidates decide.
Centres are found in two levels of k-means, so that building takes seconds for a million vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from errata.linalg.routines import qr

CELL = 256
"""Vectors of a cell, about."""
NEAR_GROUPS = 8
"""Groups of centres among which a vector's cell is looked for."""
SAMPLE = 128
"""Vectors per centre that k-means looks at."""
ROUNDS = 5
"""Of k-means, and of the iteration that finds the directions."""
SKETCH = 64
"""Directions of a sketch."""
SKETCHED = 16_384
"""Vectors whose directions of most variance are found."""
COMPARED = 8192
"""Sketches that a search compares, about."""
LEAST_CELLS = 8
"""Cells that a search looks into, at least."""
CHECKED = 128
"""Candidates that a search returns, at most."""
ROWS = 16_384
"""Rows of a product at a time."""


@dataclass(frozen=True, eq=False)
class Cells:
    """Sketches of vectors in the order of their cells."""

    mean: Tensor
    """Of the vectors, float32 ``[d]``."""
    directions: Tensor
    """Orthonormal columns, float32 ``[d, s]``."""
    sketches: Tensor
    """The sketches, and half the squared length of each, float32 ``[n, s + 1]``."""
    numbers: Tensor
    """Each one's place in the order given, int64 ``[n]``."""
    starts: tuple[int, ...]
    """First sketch of each cell, and n."""
    centres: Tensor
    """float32 ``[cells, s]``."""

    @staticmethod
    def of(vectors: Tensor) -> Cells:
        """Put vectors ``[n, d]`` into cells; the same vectors give the same cells."""
        vectors = vectors.float()
        generator = torch.Generator().manual_seed(0)
        mean, directions = _directions(vectors, generator)
        sketches = torch.cat([(part - mean) @ directions for part in torch.split(vectors, ROWS)])
        groups = _centres(sketches, max(1, round((len(vectors) / CELL) ** 0.5)), generator)
        near = _nearest(sketches, groups, NEAR_GROUPS)  # [n, groups]
        centres, first = list[Tensor](), 0
        best, cell = torch.full((len(vectors),), -torch.inf), torch.zeros(len(vectors), dtype=torch.long)
        for group in range(len(groups)):
            own = sketches[near[:, 0] == group]
            if not len(own):
                continue
            centres.append(_centres(own, max(1, round(len(own) / CELL)), generator))
            # a vector near the border of its group may be nearest to a centre of another
            for members in torch.split((near == group).any(1).nonzero()[:, 0], ROWS):
                score, place = _scores(sketches[members], centres[-1]).max(1)
                better = score > best[members]
                best[members[better]], cell[members[better]] = score[better], first + place[better]
            first += len(centres[-1])
        numbers, counts = cell.argsort(stable=True), cell.bincount(minlength=first)
        kept = counts > 0
        ordered = torch.cat([sketches, sketches.square().sum(1, keepdim=True) / 2], dim=1)[numbers]
        starts = (0, *(int(stop) for stop in counts[kept].cumsum(0)))
        return Cells(mean, directions, ordered, numbers, starts, torch.cat(centres)[kept])

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.mean, self.directions, self.sketches, self.numbers, self.centres)
        return sum(t.numel() * t.element_size() for t in tensors)

    def near(self, query: Tensor) -> Tensor:
        """Return the numbers of the vectors whose sketches are nearest to that of ``query`` ``[d]``, int64."""
        sketch = (query - self.mean) @ self.directions
        count = min(len(self.centres), COMPARED // LEAST_CELLS)
        cells = _scores(sketch[None], self.centres)[0].topk(count).indices
        spans, compared = list[tuple[int, int]](), 0
        for cell in map(int, cells.numpy()):
            spans.append((self.starts[cell], self.starts[cell + 1]))
            compared += spans[-1][1] - spans[-1][0]
            if compared >= COMPARED and len(spans) >= LEAST_CELLS:
                break
        # in numpy: a hundred small products, of which a call of torch would take the larger part
        sketches, factors = self.sketches.numpy(), torch.cat([-sketch, torch.ones(1)]).numpy()
        scores, done = np.empty(compared, np.float32), 0
        for start, stop in spans:
            np.dot(sketches[start:stop], factors, out=scores[done : done + stop - start])
            done += stop - start
        nearest = torch.as_tensor(scores).topk(min(CHECKED, compared), largest=False, sorted=False).indices
        numbers = self.numbers.numpy()
        return torch.as_tensor(np.concatenate([numbers[start:stop] for start, stop in spans]))[nearest]


def _directions(vectors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the mean of vectors ``[d]`` and their directions of most variance, orthonormal ``[d, s]``.

    By subspace iteration on a sample. Where all variances are equal any directions do: what is near in all is near in
    them, and what is not is rarely so (Johnson and Lindenstrauss).
    """
    sample = vectors[torch.randperm(len(vectors), generator=generator)[:SKETCHED]]
    mean = sample.mean(0)
    sample = sample - mean
    width = vectors.shape[1]
    directions = qr(torch.randn(width, min(width, SKETCH), generator=generator))[0]
    for _ in range(ROUNDS):
        directions = qr(sample.mT @ (sample @ directions))[0]
    return mean, directions


def _centres(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return centres of vectors by k-means on a sample ``[count, s]``."""
    sample = vectors[torch.randperm(len(vectors), generator=generator)[: SAMPLE * count]]
    centres = sample[:count].clone()
    for _ in range(ROUNDS):
        nearest = _nearest(sample, centres, 1)[:, 0]
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        counts = nearest.bincount(minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres


def _nearest(vectors: Tensor, centres: Tensor, count: int) -> Tensor:
    """Return each vector's nearest centres, int64 ``[n, count]``, fewer where there are not so many."""
    count = min(count, len(centres))
    return torch.cat([_scores(part, centres).topk(count).indices for part in torch.split(vectors, ROWS)])


def _scores(vectors: Tensor, centres: Tensor) -> Tensor:
    """Return what is larger for a nearer centre ``[n, centres]``."""
    return vectors @ centres.mT - centres.square().sum(1) / 2
