"""Directions that tell some keys from all others: principal directions of whitened keys, orthonormal bases."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.linalg import routines
from errata.linalg.moments import Moments
from errata.linalg.solve import CostMatrix

NEGLIGIBLE = 1e-10
"""Principal directions with less than this share of the largest one's energy are rounding errors."""


def shrinkage_share(moments: Moments) -> float:
    """Return the share for :func:`shrink` that counts as much as m further vectors: m / (m + count).

    It goes to 0 as vectors are added, and keeps the matrix regular while there are few.
    """
    width = moments.total.shape[0]
    return width / (width + moments.count)


def shrink(moments: Moments, share: float) -> CostMatrix:
    """Shrink a second moment towards a multiple of the identity, and factorise it.

    C <- (1 - share) C + share tr(C) / m I, ``[m, m]``. Raises ValueError where all vectors were zero.
    """
    second = moments.second
    mean = second.diagonal().mean()
    if not float(mean) > 0:
        raise ValueError("all vectors are zero: they have no second moment to whiten by")
    eye = torch.eye(second.shape[0], dtype=second.dtype, device=second.device)
    return CostMatrix.of((1 - share) * second + share * mean * eye)


def principal_directions(keys: Tensor, weights: Tensor, cost: CostMatrix, rank: int) -> Tensor:
    """Return an orthonormal basis ``[<= rank, m]`` of the directions that respond most to weighted keys.

    With X = M^-1/2 K diag(weights) = A S V^T, the rows span M^-1 K diag(weights) V_r = M^-1/2 A_r S_r. For
    equal keys k this is the line of M^-1 k. ``keys`` ``[m, n]``, ``weights`` ``[n]``; float64 ``[r, m]``.
    Raises ValueError where all weighted keys are zero.
    """
    weighted = keys.double() * weights.double()
    white = cost.whiten(weighted)
    wide = white.shape[0] <= white.shape[1]
    values, vectors = routines.eigh(white @ white.mT if wide else white.mT @ white)  # ascending
    values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    if not float(values[0]) > 0:
        raise ValueError("all keys are zero: they have no direction")
    directions = vectors if wide else white @ vectors  # [m, r], columns not of unit length
    directions = directions[:, values > NEGLIGIBLE * values[0]]
    return orthonormal(cost.whiten(directions, transposed=True).mT)


def orthonormal(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of independent rows ``[r, m]``, float64."""
    return routines.qr(rows.double().mT)[0].mT.contiguous()


def least_squares(features: Tensor, targets: Tensor) -> Tensor:
    """Return the smallest U ``[d, p]`` of those that minimise ``||U features - targets||``.

    ``features`` ``[p, n]``, ``targets`` ``[d, n]``; one p x p system, float64.
    """
    features, targets = features.double(), targets.double()
    return targets @ features.mT @ routines.pseudo_inverse(features @ features.mT)
