"""Weights rounded to few bits, as quantisation of a checkpoint would store them."""

from __future__ import annotations

from torch import Tensor


def rounded(matrix: Tensor, bits: int) -> Tensor:
    """Round each row of a matrix ``[n, m]`` to multiples of its largest magnitude over 2^(bits - 1) - 1.

    Raises ValueError for fewer than 2 bits.
    """
    if bits < 2:
        raise ValueError(f"bits: expected 2 or more, found {bits}")
    levels = 2 ** (bits - 1) - 1
    step = matrix.abs().amax(1, keepdim=True) / levels
    return (matrix / step.where(step > 0, 1)).round() * step
