"""The one formula of the closed-form editors, in its primal and dual coordinates.

    delta = R (K^T M^-1 K + gamma I)^-1 K^T M^-1

K ``[m, n]`` are keys, R ``[d, n]`` the residuals to add at them, M ``[m, m]`` what change costs
elsewhere. ROME is M = C, gamma = 0, one key; MEMIT is M = lambda C, gamma = 1. The result is kept as
thin factors. Gram matrices and their Cholesky factors are float64 whatever comes in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errata.linalg.lowrank import LowRank

RIDGE = 1e-5
"""Relative ridge added to a second moment: this times its mean diagonal. Keeps M invertible when the
corpus had fewer tokens than the keys have entries."""


@dataclass(frozen=True)
class Metric:
    """A symmetric positive definite M, as a multiple of the identity or by its Cholesky factor."""

    scale: float
    factor: Tensor | None
    """Lower Cholesky factor of M / scale, float64 ``[m, m]``; None: the identity."""

    @staticmethod
    def identity(scale: float = 1.0) -> Metric:
        """Cost every direction alike."""
        return Metric(scale, None)

    @staticmethod
    def of(matrix: Tensor, *, weight: float = 1.0, ridge: float = RIDGE) -> Metric:
        """Factorise ``weight * (matrix + ridge * mean diagonal * I)``."""
        matrix = matrix.double()
        jitter = ridge * matrix.diagonal().mean()
        shifted = matrix + jitter * torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        return Metric(weight, torch.linalg.cholesky(shifted))

    def weighted(self, weight: float) -> Metric:
        """Return the same matrix times ``weight``, without factorising again."""
        return Metric(self.scale * weight, self.factor)

    def solve(self, right: Tensor) -> Tensor:
        """Return M^-1 right, ``[m, n]`` float64."""
        right = right.double()
        if self.factor is not None:
            right = torch.cholesky_solve(right, self.factor.to(right.device))
        return right / self.scale


def update(keys: Tensor, residuals: Tensor, metric: Metric, *, gamma: float) -> LowRank:
    """Solve the formula in dual (n x n) coordinates.

    ``keys`` ``[m, n]``, ``residuals`` ``[d, n]``; returns factors of rank n in float32, or float64 when
    the residuals are. Raises ValueError when gamma is 0 and the keys are linearly dependent.
    """
    return from_solved(keys, metric.solve(keys), residuals, gamma=gamma)


def from_solved(keys: Tensor, solved: Tensor, residuals: Tensor, *, gamma: float) -> LowRank:
    """Solve the formula where ``solved`` = M^-1 K ``[m, n]`` is known already; see :func:`update`."""
    wanted = residuals.dtype
    keys, solved = keys.double(), solved.double()
    gram = keys.mT @ solved  # [n, n]
    gram = (gram + gram.mT) / 2 + gamma * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info) != 0 or not torch.isfinite(factor).all():
        raise ValueError("the keys are zero, not finite or linearly dependent; gamma > 0 is needed")
    left = torch.cholesky_solve(residuals.double().mT, factor).mT  # [d, n]
    dtype = torch.float64 if wanted == torch.float64 else torch.float32
    return balanced(left, solved.mT).to(dtype)


def update_primal(keys: Tensor, residuals: Tensor, matrix: Tensor, *, gamma: float) -> Tensor:
    """Solve the same formula by an m x m system, dense ``[d, m]`` float64; gamma > 0.

    delta = R K^T (gamma M + K K^T)^-1. For checks, and where there are more keys than entries.
    """
    keys, residuals, matrix = keys.double(), residuals.double(), matrix.double()
    system = gamma * matrix + keys @ keys.mT
    return torch.linalg.solve(system, keys @ residuals.mT).mT


def leverage(keys: Tensor, metric: Metric) -> Tensor:
    """Return k^T M^-1 k for each key, ``[n]``: how cheaply a key can be told from all others."""
    return (keys.double() * metric.solve(keys)).sum(0)


def influence(keys: Tensor, solved: Tensor, *, gamma: float) -> Tensor:
    """Return the diagonal of G (G + gamma I)^-1 with G = K^T M^-1 K, ``[n]`` in 0 to 1."""
    gram = keys.double().mT @ solved.double()
    gram = (gram + gram.mT) / 2
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + gamma * eye, gram).diagonal().clamp(0, 1)


def balanced(left: Tensor, right: Tensor) -> LowRank:
    """Pair factors ``[d, r]`` and ``[r, m]`` with equal column norms, so that float32 suits both."""
    scale = (left.norm(dim=0) / right.norm(dim=1).clamp_min(1e-300)).clamp_min(1e-300).sqrt()
    return LowRank(left / scale, right * scale[:, None])
