"""The nearest of many vectors: all of them compared, or beyond some hundred thousand those of the nearest cells.

Kept in no file: an index is built from an edit's own tensors when it is first needed, in 15 seconds for a million.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from errata.linalg.cells import Cells

EXACT = 200_000
"""Vectors up to which all are compared."""
Measure = Literal["product", "distance"]
"""What is nearest: the largest product, or the least Euclidean distance."""


class VectorIndex:
    """Vectors by number, and the search for the nearest."""

    def __init__(self, vectors: Tensor, measure: Measure, *, exact: int = EXACT) -> None:
        """Take vectors ``[entries, d]``; ``exact``: number up to which all are compared.

        Beyond it, on a CPU, the nearest is found in nearly all cases in which one vector is near at all. Products are
        then those of vectors of unit length, whose order is that of distances.
        """
        self.vectors = vectors
        self.measure: Measure = measure
        self._approximate = len(vectors) > exact
        self._here: dict[torch.device, Tensor] = {}

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product or distance of each query's nearest vector, float32 ``[n]``, and its number ``[n]``.

        ``queries``: ``[n, d]``. Raises ValueError without vectors.
        """
        if not len(self.vectors):
            raise ValueError("an index without vectors has no nearest one")
        queries = queries.float()
        if self._approximate and queries.device.type == "cpu":
            near = [self._cells.near(query) for query in queries]
            found = [
                self._best(self.vectors[n].float(), q) for n, q in zip(near, queries[:, None], strict=True)
            ]
            numbers = [n[place] for n, (_, place) in zip(near, found, strict=True)]
            return torch.cat([value for value, _ in found]), torch.cat(numbers)
        return self._best(self._on(queries.device), queries)

    def _best(self, vectors: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the best value of each query ``[n]`` among vectors, and the vector's place."""
        values = compare(vectors, queries, self.measure)
        value, place = values.max(1) if self.measure == "product" else values.min(1)
        return value, place

    @property
    def size(self) -> int:
        """Bytes beside the vectors of the edit: their sketches, in cells."""
        return self._cells.size if self._approximate else 0

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._here:
            self._here[device] = self.vectors.to(device, torch.float32)
        return self._here[device]

    @cached_property
    def _cells(self) -> Cells:
        return Cells.of(self.vectors)


def compare(vectors: Tensor, queries: Tensor, measure: Measure) -> Tensor:
    """Return the products or distances of queries ``[n, d]`` and vectors ``[entries, d]``, float32 ``[n, entries]``."""
    if measure == "product":
        return queries.float() @ vectors.mT
    # not the expanded form |a|^2 - 2ab + |b|^2, which cancels where a query is a vector itself
    return torch.cdist(queries.float(), vectors, compute_mode="donot_use_mm_for_euclid_dist")
