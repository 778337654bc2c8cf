"""The nearest of many vectors: all of them compared, or beyond some hundred thousand a graph that is searched.

Kept in no file: an index is built from an edit's own tensors when it is first needed.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from errata.extras import need

EXACT = 200_000
"""Vectors up to which all are compared."""
CONNECTIVITY, EXPANSION = 16, 128
"""Of the graph: neighbours of a vector, and candidates that are looked at when one is added or searched for."""

Measure = Literal["product", "distance"]
"""What is nearest: the largest product, or the least Euclidean distance."""


class VectorIndex:
    """Vectors by number, and the search for the nearest."""

    def __init__(self, vectors: Tensor, measure: Measure, *, exact: int = EXACT) -> None:
        """Take vectors ``[entries, d]``; ``exact``: number up to which all are compared.

        Beyond it, on a CPU, the extra package usearch finds the nearest in nearly all cases.
        """
        self.vectors = vectors
        self.measure: Measure = measure
        self._approximate = len(vectors) > exact
        self._here: dict[torch.device, Tensor] = {}

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product or distance of each query's nearest vector, float32 ``[n]``, and its number ``[n]``.

        ``queries``: ``[n, d]``. Raises ValueError without vectors, ConfigError where usearch is needed and missing.
        """
        if not len(self.vectors):
            raise ValueError("an index without vectors has no nearest one")
        queries = queries.float()
        if self._approximate and queries.device.type == "cpu":
            matches = self._graph.search(queries.numpy(), 1)
            number = torch.tensor(matches.keys.astype("int64")).reshape(len(queries))
            near = self.vectors[number].float()
            exact = (
                (near * queries).sum(1)
                if self.measure == "product"
                else (near - queries).square().sum(1).sqrt()
            )
            return exact, number
        values = compare(self._on(queries.device), queries, self.measure)
        value, number = values.max(1) if self.measure == "product" else values.min(1)
        return value, number

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._here:
            self._here[device] = self.vectors.to(device, torch.float32)
        return self._here[device]

    @cached_property
    def _graph(self) -> Any:
        (usearch,) = need(f"an index of more than {EXACT:,} vectors", "index", "usearch.index")
        graph = usearch.Index(
            ndim=self.vectors.shape[1], metric="ip" if self.measure == "product" else "l2sq", dtype="f32",
            connectivity=CONNECTIVITY, expansion_add=EXPANSION, expansion_search=EXPANSION,
        )  # fmt: skip
        numbers = torch.arange(len(self.vectors)).numpy()
        graph.add(numbers, self.vectors.float().numpy(), threads=torch.get_num_threads())
        return graph


def compare(vectors: Tensor, queries: Tensor, measure: Measure) -> Tensor:
    """Return the products or distances of queries ``[n, d]`` and vectors ``[entries, d]``, float32 ``[n, entries]``."""
    if measure == "product":
        return queries.float() @ vectors.mT
    # not the expanded form |a|^2 - 2ab + |b|^2, which cancels where a query is a vector itself
    return torch.cdist(queries.float(), vectors, compute_mode="donot_use_mm_for_euclid_dist")
