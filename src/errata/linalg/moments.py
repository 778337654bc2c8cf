"""Streaming moments of vectors: count, mean and uncentred second moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Running sums over vectors of width ``m``; batches are summed in float32, kept in float64."""

    count: int
    total: Tensor
    """Sum of vectors, float64 ``[m]``."""
    gram: Tensor
    """Sum of outer products, float64 ``[m, m]``."""

    @staticmethod
    def empty(width: int, device: torch.device | str = "cpu") -> Moments:
        """Start with nothing seen."""
        return Moments(
            0,
            torch.zeros(width, dtype=torch.float64, device=device),
            torch.zeros(width, width, dtype=torch.float64, device=device),
        )

    def update_(self, vectors: Tensor) -> None:
        """Add vectors ``[n, m]``."""
        vectors = vectors.detach()
        if vectors.dtype != torch.float64:
            vectors = vectors.float()
        self.count += vectors.shape[0]
        self.total += vectors.sum(0).double()
        self.gram += (vectors.mT @ vectors).double()

    @property
    def mean(self) -> Tensor:
        """Mean vector ``[m]``."""
        return self.total / max(1, self.count)

    @property
    def second(self) -> Tensor:
        """Uncentred second moment E[k k^T], ``[m, m]``."""
        return self.gram / max(1, self.count)
