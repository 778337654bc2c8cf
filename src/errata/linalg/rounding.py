"""Weights rounded to few bits, as quantisation of a checkpoint would store them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

GROUP = 128
"""Entries of a row that share a scale on the grid ``int4``."""
NF4_GROUP = 64
"""The same on ``nf4``."""
NF4_OFFSET = 0.9677083
"""Largest quantile of the 4-bit normal float (QLoRA, arXiv 2305.14314)."""


def nf4_levels() -> Tensor:
    """Return the levels of the 4-bit normal float, float64 ``[16]``: quantiles of a normal distribution, the largest 1.

    Eight above zero and seven below it at equal distances of probability, and zero itself.
    """
    above = torch.linspace(NF4_OFFSET, 0.5, 9, dtype=torch.float64)[:-1]
    below = torch.linspace(NF4_OFFSET, 0.5, 8, dtype=torch.float64)[:-1]
    positive, negative = (math.sqrt(2) * torch.erfinv(2 * side - 1) for side in (above, below))
    levels = torch.cat([-negative, positive.new_zeros(1), positive.flip(0)])
    return levels / levels.abs().max()


def rounded(matrix: Tensor, bits: int) -> Tensor:
    """Round each row of a matrix ``[n, m]`` to multiples of its largest magnitude over 2^(bits - 1) - 1.

    Raises ValueError for fewer than 2 bits.
    """
    if bits < 2:
        raise ValueError(f"bits: expected 2 or more, found {bits}")
    levels = 2 ** (bits - 1) - 1
    step = matrix.abs().amax(1, keepdim=True) / levels
    return (matrix / step.where(step > 0, 1)).round() * step


def _in_groups(matrix: Tensor, size: int, act: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of groups ``[g, size]`` to the rows of a matrix ``[n, m]``; a row's last group is filled up."""
    rows, width = matrix.shape
    groups = functional.pad(matrix, (0, -width % size)).reshape(-1, size)
    return act(groups).reshape(rows, -1)[:, :width]


def _nf4(groups: Tensor) -> Tensor:
    levels = nf4_levels().to(groups)
    scale = groups.abs().amax(1, keepdim=True)
    shares = (groups / scale.where(scale > 0, 1)).contiguous()
    at = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)
    return levels[at] * scale


GRIDS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({
    "int8": lambda matrix: rounded(matrix, 8),
    "int4": lambda matrix: _in_groups(matrix, GROUP, lambda groups: rounded(groups, 4)),
    "nf4": lambda matrix: _in_groups(matrix, NF4_GROUP, _nf4),
})  # fmt: skip
"""What weights may be rounded to: ``int8`` with a scale for each row, ``int4`` with one for every 128 entries of a row,
``nf4`` with one for every 64."""


def kept_share(before: Tensor, after: Tensor, grid: str, change: Tensor | None = None) -> tuple[float, float]:
    """Return what rounding leaves of a change from W ``[n, m]`` to W', and the rounding noise it lies in.

    ``change``: delta ``[n, m]``, where storing W' in few bits has lost some of it; None: W' - W. With Q the grid:
    <Q(W') - Q(W), delta> / ||delta||^2, about 1 where the change survives and 0 where it is rounded away, and
    ||Q(W') - W'|| / ||delta||. Both NaN for no change.
    """
    act = GRIDS[grid]
    delta = (after - before if change is None else change).double()
    size = float(delta.square().sum())
    if not size:
        return math.nan, math.nan
    rounded_after = act(after).double()
    kept = float(((rounded_after - act(before).double()) * delta).sum()) / size
    noise = float((rounded_after - after.double()).square().sum())
    return kept, math.sqrt(noise / size)
