"""PyTorch's decompositions, solvers and norms, with types and shapes.

PyTorch ships no types for ``torch.linalg``. Here its functions are called, each once, and their results get the types
that its documentation states; nothing else is done to arguments or results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_torch: Any = torch
_linalg: Any = torch.linalg


def cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower Cholesky factor of a symmetric matrix ``[m, m]``; None unless it is positive definite."""
    factor, info = _linalg.cholesky_ex(matrix)
    return None if int(info) else factor


def cholesky_solve(factor: Tensor, right: Tensor) -> Tensor:
    """Solve ``L L^T X = right`` with a lower Cholesky factor L ``[m, m]``; X and ``right`` ``[m, n]``."""
    return torch.cholesky_solve(right, factor)


def solve_triangular(factor: Tensor, right: Tensor, *, upper: bool = False) -> Tensor:
    """Solve ``T X = right`` with a triangular T ``[m, m]``, lower unless ``upper``; X and ``right`` ``[m, n]``."""
    return _linalg.solve_triangular(factor, right, upper=upper)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve ``matrix X = right``, ``matrix`` ``[m, m]``, X and ``right`` ``[m, n]``; RuntimeError if singular."""
    return _linalg.solve(matrix, right)


def least_squares(a: Tensor, b: Tensor) -> Tensor:
    """Return the shortest X ``[m, k]`` of those that minimise |A X - B|, A ``[n, m]`` and B ``[n, k]``; on the CPU."""
    return _linalg.lstsq(a, b, driver="gelsd").solution


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """Return the Moore-Penrose inverse of a symmetric matrix ``[m, m]``, of the same shape."""
    return _linalg.pinv(matrix, hermitian=True)


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues ``[m]``, ascending, of a symmetric ``[m, m]`` and its eigenvectors, one a column."""
    values, vectors = _linalg.eigh(matrix)
    return values, vectors


def eigenvalues(matrix: Tensor) -> Tensor:
    """Return the eigenvalues ``[m]``, ascending, of a symmetric matrix ``[m, m]``."""
    return _linalg.eigvalsh(matrix)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U ``[d, r]``, s ``[r]`` descending and V^T ``[r, m]`` of a matrix ``[d, m]``, r = min(d, m)."""
    u, s, vh = _linalg.svd(matrix, full_matrices=False)
    return u, s, vh


def triangle(matrix: Tensor) -> Tensor:
    """Return R ``[m, m]``, upper, of the QR decomposition of a matrix A ``[n, m]``, n at least m: R^T R = A^T A."""
    return _linalg.qr(matrix, mode="r")[1]


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q ``[d, r]`` with orthonormal columns and upper triangular R ``[r, n]`` of ``[d, n]``, r = min(d, n)."""
    q, r = _linalg.qr(matrix)
    return q, r


def block_diagonal(blocks: Tensor) -> Tensor:
    """Return the matrix ``[E m, E m]`` with blocks ``[E, m, m]`` on its diagonal and zeros elsewhere."""
    return _torch.block_diag(*blocks)


def norm(values: Tensor, dim: int | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the Euclidean norm over one axis, or ``[]`` over all entries, summed in ``dtype`` if one is given."""
    return _linalg.vector_norm(values, dim=dim, dtype=dtype)
