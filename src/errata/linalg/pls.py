"""Partial least squares: the directions of one set of vectors that covary most with another."""

from __future__ import annotations

import torch
from torch import Tensor

from errata.linalg import routines
from errata.linalg.routines import norm

NEGLIGIBLE = 1e-10
"""A cross-covariance below this share of the first one, or of what x and y amount to uncentred, is a rounding error."""


def pls_weights(x: Tensor, y: Tensor, rank: int) -> Tensor:
    """Return the weights ``[d, k]``, orthonormal columns, of partial least squares of y on x, k at most ``rank``.

    ``x`` ``[n, d]``, ``y`` ``[n, p]``; both are centred, neither is scaled, float64. Each weight is the leading left
    singular vector of X^T Y, after the scores of those before were regressed out of both (NIPALS). Ends where no
    covariance is left.
    """
    least = NEGLIGIBLE * float(norm(x.double()) * norm(y.double()))
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    columns = list[Tensor]()
    for _ in range(rank):
        u, s, _ = routines.svd(x.mT @ y)
        largest = float(s[0])
        if largest <= least:
            break
        least = max(least, NEGLIGIBLE * largest)
        weight = u[:, 0]
        scores = x @ weight  # [n]
        energy = scores @ scores
        columns.append(weight)
        x = x - torch.outer(scores, scores @ x) / energy
        y = y - torch.outer(scores, scores @ y) / energy
    if not columns:
        return x.new_zeros(x.shape[1], 0)
    return routines.qr(torch.stack(columns, 1))[0]
