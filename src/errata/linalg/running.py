"""Running mean and variance of vectors that come in chunks.

Chunks are merged by the formula of Chan, Golub and LeVeque (1979), so the order and the sizes of the
chunks change nothing but rounding, and a chunk may be a single vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

RESOLUTION = torch.finfo(torch.float32).eps
"""Relative spacing of float32, the precision of the vectors."""


@dataclass
class Running:
    """Count, mean and summed squared deviation of vectors of width ``m``, entry by entry, in float64."""

    PARTS: ClassVar[tuple[str, ...]] = ("count", "mean", "spread")

    count: int
    mean: Tensor
    """Mean ``[m]``."""
    spread: Tensor
    """Sum of squared deviations from the mean ``[m]``."""

    @staticmethod
    def empty(width: int) -> Running:
        """Return the statistics of no vectors."""
        zeros = torch.zeros(width, dtype=torch.float64)
        return Running(0, zeros, zeros.clone())

    @staticmethod
    def of(vectors: Tensor) -> Running:
        """Summarise vectors ``[n, m]``; n may be 0 or 1."""
        vectors = vectors.detach().double()
        if not len(vectors):
            return Running.empty(vectors.shape[1])
        mean = vectors.mean(0)
        return Running(len(vectors), mean, (vectors - mean).square().sum(0))

    def update_(self, vectors: Tensor) -> None:
        """Add vectors ``[n, m]``."""
        self.merge_(Running.of(vectors))

    def update_published_(self, vectors: Tensor) -> None:
        """Add vectors ``[n, m]`` as MALMEN's and UltraEdit's code does: by n times their unbiased variance.

        Exact would be n - 1 times; the result depends on the chunks. Raises ValueError for one vector.
        """
        other = Running.of(vectors)
        if other.count < 2:
            raise ValueError(f"the variance of {other.count} vectors is not defined; two are needed")
        other.spread = other.spread * (other.count / (other.count - 1))
        self.merge_(other)

    def merge_(self, other: Running) -> None:
        """Add the vectors of another one. Raises ValueError when the widths differ."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"widths {len(self.mean)} and {len(other.mean)} do not merge")
        total = self.count + other.count
        if not total:
            return
        step = other.mean - self.mean
        self.mean = self.mean + step * (other.count / total)
        self.spread = self.spread + other.spread + step.square() * (self.count * other.count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Unbiased variance ``[m]``. Raises ValueError before the second vector: one has none."""
        if self.count < 2:
            raise ValueError(f"the variance of {self.count} vectors is not defined; two are needed")
        return self.spread / (self.count - 1)

    def normalise(self, vectors: Tensor, *, centre: bool = True, floor: float | None = None) -> Tensor:
        """Return vectors ``[n, m]`` less the mean and over the deviation, float64.

        Without ``centre``: over the root mean square, from the first vector on. A deviation that float32
        cannot tell from the mean's rounding counts as none, and gives 0; with ``floor``, that number is added
        to every deviation instead. Raises ValueError where :attr:`variance` does.
        """
        vectors = vectors.double()
        tiny = torch.finfo(torch.float64).tiny
        if not centre:
            square = self.mean.square() + self.spread / max(1, self.count)
            return vectors / (square.sqrt() + tiny)
        least = RESOLUTION * self.mean.abs() + tiny if floor is None else floor
        return (vectors - self.mean) / (self.variance.sqrt() + least)

    def tensors(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Return the count ``[1]``, mean and spread ``[m]`` as tensors, to be stored; :meth:`restore` reads them back.

        In float32, counts are exact up to 2^24 vectors and to 6e-8 of their size beyond.
        """
        count = torch.tensor([self.count], dtype=dtype)
        return {"count": count, "mean": self.mean.to(dtype), "spread": self.spread.to(dtype)}

    @staticmethod
    def restore(tensors: Mapping[str, Tensor]) -> Running:
        """Build the statistics from what :meth:`tensors` gave: count ``[1]``, mean and spread ``[m]``."""
        return Running(int(tensors["count"][0]), tensors["mean"].double(), tensors["spread"].double())
