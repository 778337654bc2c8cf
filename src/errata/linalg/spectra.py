"""Singular values of a matrix and what they say of its shape: few strong directions, or many alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errata.linalg import routines

DEEPEST_GAP = 64
"""Largest number of leading directions that a gap is looked for below."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a matrix ``[d, m]``, descending, with its singular vectors on both sides; float64."""

    values: Tensor
    """``[r]``, r = min(d, m); relative error about 1e-8 of the largest."""
    left: Tensor
    """Columns ``[d, r]``; only those of values well above that error are accurate."""
    right: Tensor
    """Rows ``[r, m]``, likewise."""

    @staticmethod
    def of(matrix: Tensor) -> Spectrum:
        """Decompose a matrix ``[d, m]`` through the smaller of its Gram matrices."""
        wide = matrix.double()
        if wide.shape[0] > wide.shape[1]:
            other = Spectrum.of(wide.mT)
            return Spectrum(other.values, other.right.mT, other.left.mT)
        squares, vectors = routines.eigh(wide @ wide.mT)
        values = squares.flip(0).clamp_min(0).sqrt()
        left = vectors.flip(1)
        tiny = torch.finfo(values.dtype).tiny
        return Spectrum(values, left, left.mT @ wide / values.clamp_min(tiny)[:, None])

    @property
    def energy(self) -> float:
        """Squared Frobenius norm."""
        return float(self.values.square().sum())

    @property
    def participation(self) -> float:
        """(sum s^2)^2 / sum s^4: in how many directions the matrix lies, were these equally strong; 0 for zeros."""
        fourth = float(self.values.pow(4).sum())
        return self.energy**2 / fourth if fourth else 0.0

    @property
    def height(self) -> float:
        """log(s_1 / median s), the median no less than 1e-8 of s_1; NaN for zeros, which have no shape."""
        if not float(self.values[0]):
            return float("nan")
        return float((self.values[0] / self.values.median().clamp_min(1e-8 * self.values[0])).log())

    def gap(self, deepest: int = DEEPEST_GAP) -> tuple[int, float]:
        """Return after how many values the largest drop comes, and its ratio s_r / s_(r+1); (0, 1) for one value."""
        count = min(deepest, len(self.values) - 1)
        if count < 1:
            return 0, 1.0
        floor = float(self.values[0]) * 1e-8 or 1.0
        ratios = self.values[:count].clamp_min(floor) / self.values[1 : count + 1].clamp_min(floor)
        place = int(ratios.argmax())
        return place + 1, float(ratios[place])


def robust_scores(values: Tensor, floor: float) -> Tensor:
    """Return how far values ``[n]`` lie from their median, in standard deviations estimated by the median deviation.

    ``floor``: least standard deviation to divide by, so that values which are all alike give no large scores. A value
    of NaN, of something that has none, counts nowhere and has a score of 0.
    """
    known = values[~values.isnan()]
    if not len(known):
        return torch.zeros_like(values)
    centre = known.median()
    spread = 1.4826 * (known - centre).abs().median()
    return ((values - centre) / spread.clamp_min(floor)).nan_to_num(nan=0.0)
