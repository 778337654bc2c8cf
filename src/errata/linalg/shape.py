"""Change the spectrum or the entries of a delta, as stabilisers do; low-rank deltas stay low-rank where possible."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from errata.linalg import routines
from errata.linalg.lowrank import LowRank, product_svd
from errata.linalg.solve import square_factor


def largest_entries(delta: Tensor, weight: Tensor, share: float) -> Tensor:
    """Keep the share of entries that are largest beside the weight's own, |delta / weight|; zero the rest.

    Both ``[d_out, d_in]``.
    """
    ratio = (delta / (weight + 1e-8)).abs()
    count = max(1, round(share * ratio.numel()))
    bound = ratio.flatten().kthvalue(ratio.numel() - count + 1).values
    return torch.where(ratio >= bound, delta, torch.zeros_like(delta))


def largest_singular(matrix: Tensor) -> float:
    """Return the largest singular value of a matrix ``[d, m]``, from the smaller Gram matrix in float64."""
    wide = matrix.double()
    gram = wide @ wide.mT if wide.shape[0] <= wide.shape[1] else wide.mT @ wide
    return float(routines.eigenvalues(gram)[-1].clamp_min(0).sqrt())


def excess(delta: LowRank | Tensor, bound: float, base: float) -> LowRank:
    """Return the correction that brings singular values over a bound down to ``bound + log_base(s / bound)``.

    The result ``[d_out, d_in]``, added to the delta, bounds its growth; the rank is the number of such values.
    """
    if isinstance(delta, LowRank):
        q_out, q_in, (u, s, vh) = product_svd(delta.B.double(), delta.A.double())
        u, vh = q_out @ u, vh @ q_in.mT
    else:
        u, s, vh = routines.svd(delta.double())
    over = s > bound
    # log_a s - log_a bound + bound: continuous at the bound, and what grows beyond it grows slowly
    new = (s[over] / bound).log() / math.log(base) + bound
    new = torch.minimum(new, s[over])
    dtype = delta.B.dtype if isinstance(delta, LowRank) else delta.dtype
    return LowRank(u[:, over] * (new - s[over]), vh[over]).to(dtype)


def leading_inputs(weight: Tensor, energy: float) -> Tensor:
    """Return the leading right singular vectors of a weight ``[d_out, d_in]`` with rows of norm one, ``[d_in, r]``.

    As many as hold at most a share of the energy, and one more.
    """
    rows = weight.double()
    rows = rows / routines.norm(rows, 1)[:, None].clamp_min(1e-12)
    _, s, vh = routines.svd(rows)
    shares = s.square().cumsum(0) / s.square().sum()
    count = min(int((shares <= energy).sum()) + 1, len(s))
    return vh[:count].mT


def damp(delta: LowRank | Tensor, directions: Tensor, strength: float) -> LowRank | Tensor:
    """Multiply a delta by I - strength V V^T on its input side, ``directions`` V ``[d_in, r]``."""
    right = delta.A if isinstance(delta, LowRank) else delta
    wide = right.double()
    right = (wide - strength * (wide @ directions) @ directions.mT).to(right.dtype)
    return LowRank(delta.B, right) if isinstance(delta, LowRank) else right


def condense(columns: Tensor) -> Tensor:
    """Return at most m columns with the same sum of outer products as the given ones ``[m, n]``."""
    if columns.shape[1] <= columns.shape[0]:
        return columns
    return square_factor(columns).to(columns.dtype)
