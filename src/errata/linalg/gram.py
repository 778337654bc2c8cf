"""Ridge regression on rows in its dual form: from what is wanted at each row to coefficients of the rows.

S = argmin |U S - D|^2 + r |S|^2 = (U^T U + r I)^-1 U^T D = U^T C,    C = (U U^T + r I)^-1 D
"""

from __future__ import annotations

import torch
from torch import Tensor

from errata.linalg import routines


def solve_gram(rows: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Return (U U^T + r I)^-1 D ``[n, m]`` for rows U ``[n, d]``, D ``[n, m]`` and a positive ridge r; float64.

    Through the smaller of the two Gram matrices: for n above d, (D - U (U^T U + r I)^-1 U^T D) / r. Raises ValueError
    for numbers that are not finite.
    """
    rows, right = rows.double(), right.double()
    count, width = rows.shape
    if count <= width:
        return _solve(rows @ rows.mT, right, ridge)
    return (right - rows @ _solve(rows.mT @ rows, rows.mT @ right, ridge)) / ridge


def _solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    factor = routines.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if factor is None:
        raise ValueError(
            f"a Gram matrix with ridge {ridge:g} is not positive definite: are all its entries finite?"
        )
    return routines.cholesky_solve(factor, right)
