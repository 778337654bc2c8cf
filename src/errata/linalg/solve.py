"""The one formula of the closed-form editors, in its primal and dual coordinates.

    delta = R (K^T M^-1 K + gamma I)^-1 K^T M^-1

K ``[m, n]`` are keys, R ``[d, n]`` the residuals to add at them, M ``[m, m]`` what change costs
elsewhere. ROME is M = C, gamma = 0, one key; MEMIT is M = lambda C, gamma = 1. The result is returned as
thin factors. Gram matrices and their Cholesky factors are float64 whatever comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.linalg import routines
from errata.linalg.lowrank import LowRank, balance

RIDGE = 1e-5
"""Relative ridge added to a second moment: this times its mean diagonal. Keeps M invertible when the
corpus had fewer tokens than the keys have entries."""


MOST_RIDGE = 1e-2
"""Largest relative ridge tried for a matrix whose rounding errors outweigh the usual one."""


@dataclass(frozen=True)
class CostMatrix:
    """A symmetric positive definite M ``[m, m]``: a multiple of the identity, a Cholesky factor, or eigenvectors.

    With a ``basis`` that does not span everything, M is infinite outside of it (or inside, with
    ``outside``): nothing may change there. A block-diagonal M of E blocks has tensors with an axis for them in front;
    coordinates are then those of the blocks in a row, m = E times the width of one.
    """

    scale: float
    factor: Tensor | None = None
    """Lower Cholesky factor of M / scale, float64 ``[m, m]``, or of its blocks ``[E, m / E, m / E]``."""
    basis: Tensor | None = None
    """Orthonormal columns ``[m, r]``; of blocks ``[E, m / E, m / E]``, all of them."""
    spectrum: Tensor | None = None
    """Eigenvalues of M / scale on the basis ``[r]``, or ``[E, m / E]``, infinite where nothing may change; None: all
    one."""
    outside: bool = False
    """Whether the basis spans what must not change, rather than what may."""
    name: str = "identity"
    """What M is, but for its scale."""

    @property
    def label(self) -> str:
        """Identity of M, for records."""
        return f"{self.name} x {self.scale:.9g}"

    @staticmethod
    def identity(scale: float = 1.0) -> CostMatrix:
        """Return a multiple of the identity: every direction costs the same."""
        return CostMatrix(scale)

    @staticmethod
    def of(
        matrix: Tensor, *, weight: float = 1.0, ridge: float = RIDGE, name: str = "matrix", overwrite: bool = False
    ) -> CostMatrix:  # fmt: skip
        """Factorise ``weight * (matrix + ridge * mean diagonal * I)``, ``matrix`` ``[m, m]``; or blocks ``[E, m, m]``.

        The ridge grows, and the name says so, where rounding in a matrix of low rank outweighs it. ``overwrite``: the
        matrix's diagonal may be changed, which spares a copy. Raises ValueError for a matrix that is zero, not finite
        or far from positive semidefinite.
        """
        if matrix.ndim == 3:
            each = (_factor(block.double(), ridge, overwrite=overwrite) for block in matrix)
            factors, ridges = zip(*each, strict=True)
            factor, final = torch.stack(factors), max(ridges)
        else:
            factor, final = _factor(matrix.double(), ridge, overwrite=overwrite)
        label = name if final == ridge else f"{name}, ridge {final:.0e}"
        return CostMatrix(weight, factor, name=label)

    @staticmethod
    def of_eigen(
        values: Tensor, vectors: Tensor, *, weight: float = 1.0, add: float = 0.0, ridge: float = RIDGE,
        name: str = "matrix",
    ) -> CostMatrix:  # fmt: skip
        """Return ``weight * (matrix + ridge * mean diagonal * I) + add * I`` from an eigendecomposition.

        ``values`` ``[m]``, ``vectors`` ``[m, m]`` one a column; or those of blocks. Costs no factorisation.
        """
        values = values.double().clamp_min(0)
        spectrum = values + ridge * values.mean() + add / weight
        return CostMatrix(weight, basis=vectors, spectrum=spectrum, name=f"{name} + {add / weight:.9g}")

    @staticmethod
    def within(
        values: Tensor, vectors: Tensor, *, below: float, cost: float = 1.0, name: str = "matrix"
    ) -> CostMatrix:
        """Allow change only along eigenvectors whose eigenvalue is under ``below``, at ``cost`` each way.

        ``values`` ``[m]``, ``vectors`` ``[m, m]`` one a column; the smaller of the two complementary bases is stored.
        Of blocks ``[E, m]`` and ``[E, m, m]``, the bound is the same for all.
        """
        small = values < below
        label = f"{name} under {below:.9g}"
        if values.ndim == 2:
            spectrum = torch.where(small, 1.0, torch.inf).to(values)
            return CostMatrix(cost, basis=vectors, spectrum=spectrum, name=label)
        if int(small.sum()) * 2 <= len(values):
            return CostMatrix(cost, basis=vectors[:, small], name=label)
        return CostMatrix(cost, basis=vectors[:, ~small], outside=True, name=label)

    def weighted(self, weight: float) -> CostMatrix:
        """Return the same matrix times ``weight``, without factorising again."""
        return replace(self, scale=self.scale * weight)

    def only(self, columns: Tensor) -> CostMatrix:
        """Return the cost among some coordinates, the others not to change; ``[n]`` indices."""
        if self.factor is None:
            raise ValueError("only a cost matrix with a Cholesky factor can be restricted to coordinates")
        if self.blocks:
            block, entry = columns // self.factor.shape[-1], columns % self.factor.shape[-1]
            rows = self.factor[block, entry]
            part, _ = _factor(rows @ rows.mT * (block[:, None] == block), 0.0)
        else:
            rows = self.factor[columns]
            part, _ = _factor(rows @ rows.mT, 0.0)
        return CostMatrix(self.scale, part, name=f"{self.name} among {len(columns)}")

    def solve(self, right: Tensor) -> Tensor:
        """Return M^-1 right, ``[m, n]`` float64."""
        right = right.double()
        if self.blocks:
            return self._solve_blocks(self._by_block(right)).flatten(0, 1) / self.scale
        if self.factor is not None:
            right = routines.cholesky_solve(self.factor.to(right.device), right)
        elif self.basis is not None:
            basis = self.basis.to(right.device).double()
            inside = basis.mT @ right
            if self.spectrum is not None:
                inside = inside / self.spectrum.to(right.device)[:, None]
            right = right - basis @ inside if self.outside else basis @ inside
        return right / self.scale

    @property
    def blocks(self) -> int:
        """Number of blocks E of a block-diagonal M; 0 of any other."""
        tensor = self.basis if self.factor is None else self.factor
        return 0 if tensor is None or tensor.ndim == 2 else len(tensor)

    def _by_block(self, right: Tensor) -> Tensor:
        """Return the rows of a matrix ``[m, n]`` by block, ``[E, m / E, n]``."""
        return right.reshape(self.blocks, right.shape[0] // self.blocks, right.shape[1])

    def _solve_blocks(self, right: Tensor) -> Tensor:
        """Return M^-1 right but for the scale; both ``[E, m / E, n]``."""
        if self.factor is not None:
            return routines.cholesky_solve(self.factor.to(right.device), right)
        assert self.basis is not None and self.spectrum is not None
        basis = self.basis.to(right.device).double()
        return basis @ ((basis.mT @ right) / self.spectrum.to(right.device)[..., None])

    def whiten(self, right: Tensor, *, transposed: bool = False) -> Tensor:
        """Return L^-1 right, or L^-T right, ``[m, n]`` float64, with M / scale = L L^T; ``right`` itself without L."""
        right = right.double()
        if self.factor is None:
            return right
        factor = self.factor.to(right.device)
        rows = self._by_block(right) if self.blocks else right
        solved = routines.solve_triangular(factor.mT if transposed else factor, rows, upper=transposed)
        return solved.flatten(0, 1) if self.blocks else solved

    def dense(self) -> Tensor:
        """Return M ``[m, m]``, float64; needs the Cholesky factor."""
        if self.factor is None:
            raise ValueError("only a cost matrix with a Cholesky factor can be multiplied out")
        product = self.scale * self.factor @ self.factor.mT
        return routines.block_diagonal(product) if self.blocks else product

    def energy(self, delta: LowRank) -> float:
        """Return tr(delta M delta^T), what a change costs; needs the Cholesky factor or the identity."""
        right = delta.A.double()
        if self.factor is not None and self.blocks:
            factor = self.factor.to(right.device)
            right = (self._by_block(right.mT).mT @ factor).transpose(0, 1).flatten(1)
        elif self.factor is not None:
            right = right @ self.factor.to(right.device)
        elif self.basis is not None:
            raise ValueError("the energy needs a cost matrix with a Cholesky factor, not with eigenvectors")
        return LowRank(delta.B.double(), right).norm() ** 2 * self.scale


def _factor(matrix: Tensor, ridge: float, *, overwrite: bool = False) -> tuple[Tensor, float]:
    """Return the Cholesky factor of a matrix plus a relative ridge, and that ridge, the least that works.

    Arguments and errors are those of :meth:`CostMatrix.of`.
    """
    diagonal = matrix.diagonal().clone()
    mean = float(diagonal.mean())
    if not (mean > 0 and math.isfinite(float(matrix.sum()))):
        raise ValueError("the matrix is zero or not finite")
    shifted = matrix if overwrite else matrix.clone()
    trial = ridge
    while trial <= max(ridge, MOST_RIDGE):
        shifted.diagonal().copy_(diagonal + trial * mean)
        factor = routines.cholesky(shifted)
        if factor is not None:
            return factor, trial
        trial = max(10 * trial, 1e-12)
    raise ValueError("the matrix has eigenvalues far below zero: expected a second moment")


def update(keys: Tensor, residuals: Tensor, cost: CostMatrix, *, gamma: float) -> LowRank:
    """Solve the formula in dual (n x n) coordinates.

    ``keys`` ``[m, n]``, ``residuals`` ``[d, n]``; returns factors of rank n in float32, or float64 when
    the residuals are. Raises ValueError when gamma is 0 and the keys are linearly dependent.
    """
    return from_solved(keys, cost.solve(keys), residuals, gamma=gamma)


def solve_with_history(solved: Tensor, history_keys: Tensor, history_solved: Tensor) -> Tensor:
    """Return (M + P P^T)^-1 K from Y = M^-1 K, P ``[m, p]`` and M^-1 P, by n x n algebra; ``[m, n]``.

    P are the keys of earlier edits, ``solved`` Y ``[m, n]``; P P^T is added to M without an m x m matrix.
    """
    solved, past = solved.double(), history_solved.double()
    keys = history_keys.double()
    gram = keys.mT @ past
    gram = (gram + gram.mT) / 2 + torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return solved - past @ routines.cholesky_solve(_factor(gram, 0.0)[0], keys.mT @ solved)


def independent_columns(keys: Tensor, solved: Tensor, *, floor: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Return L ``[m, r]`` with L L^T = P P^T, and M^-1 L, from P and M^-1 P ``[m, p]``; float64, r at most m and p.

    Directions whose eigenvalue is below ``floor`` times the largest are left out, as keys are often equal.
    """
    keys, solved = keys.double(), solved.double()
    wide = keys.shape[1] > keys.shape[0]
    values, vectors = routines.eigh(keys @ keys.mT if wide else keys.mT @ keys)
    large = values > floor * values[-1]
    right = vectors[:, large]
    if wide:
        right = keys.mT @ (right * values[large].rsqrt())
    return keys @ right, solved @ right


def from_solved(keys: Tensor, solved: Tensor, residuals: Tensor, *, gamma: float) -> LowRank:
    """Solve the formula from ``solved`` = M^-1 K ``[m, n]``; arguments and errors as of :func:`update`."""
    keys, solved = keys.double(), solved.double()
    gram = keys.mT @ solved  # [n, n]
    gram = (gram + gram.mT) / 2 + gamma * torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    factor = routines.cholesky(gram)
    if factor is None or not torch.isfinite(factor).all():
        raise ValueError("the keys are zero, not finite or linearly dependent; gamma > 0 is needed")
    output = routines.cholesky_solve(factor, residuals.double().mT).mT  # [d, n]
    dtype = torch.float64 if residuals.dtype == torch.float64 else torch.float32
    return balance(output, solved.mT).to(dtype)


def update_primal(keys: Tensor, residuals: Tensor, matrix: Tensor, *, gamma: float) -> Tensor:
    """Solve the same formula by an m x m system, dense ``[d, m]`` float64; gamma > 0.

    delta = R K^T (gamma M + K K^T)^-1. For checks, and where there are more keys than entries.
    """
    keys, residuals, matrix = keys.double(), residuals.double(), matrix.double()
    system = gamma * matrix + keys @ keys.mT
    return routines.solve(system, keys @ residuals.mT).mT


def key_basis(keys: Tensor, solved: Tensor, *, floor: float = 1e-6) -> Tensor:
    """Return A ``[m, r]`` that spans M^-1 K and is orthonormal in M: A^T M A = I; float64.

    ``keys`` K and ``solved`` M^-1 K ``[m, n]``. With G = K^T M^-1 K = Q L Q^T, A = M^-1 K Q L^(-1/2); directions
    with an eigenvalue under ``floor`` times the largest are left out, as keys are often equal. A change Y A^T then
    costs the squared norm of Y. Raises ValueError for keys that are zero or not finite.
    """
    keys, solved = keys.double(), solved.double()
    gram = keys.mT @ solved
    if not torch.isfinite(gram).all():
        raise ValueError("the keys are not finite")
    values, vectors = routines.eigh((gram + gram.mT) / 2)
    large = values > floor * values[-1]
    if not float(values[-1]) > 0:
        raise ValueError("the keys are zero")
    return solved @ (vectors[:, large] * values[large].rsqrt())


def square_factor(factor: Tensor) -> Tensor:
    """Return L ``[m, m]``, lower, float64, with L L^T = P P^T for P ``[m, p]`` of many columns, p at least m."""
    return routines.triangle(factor.double().mT).mT


def leverage(keys: Tensor, cost: CostMatrix) -> Tensor:
    """Return k^T M^-1 k for each key, ``[n]``: how little it costs to change the output at that key alone."""
    return (keys.double() * cost.solve(keys)).sum(0)


def similar_pairs(keys: Tensor, solved: Tensor, above: float) -> list[tuple[int, int]]:
    """Return pairs (i, j), i < j, of keys whose whitened forms have a cosine above a bound.

    ``keys`` K and ``solved`` Y = M^-1 K, both ``[m, n]``; the cosine is
    k_i^T y_j over the geometric mean of k_i^T y_i and k_j^T y_j.
    """
    gram = keys.double().mT @ solved.double()
    size = gram.diagonal().clamp_min(1e-300).sqrt()
    cosine = torch.triu(gram / size[:, None] / size[None, :], diagonal=1)
    return [(int(i), int(j)) for i, j in (cosine > above).nonzero()]


def influence(keys: Tensor, solved: Tensor, *, gamma: float) -> Tensor:
    """Return the diagonal of G (G + gamma I)^-1 with G = K^T M^-1 K, ``[n]`` in 0 to 1."""
    gram = keys.double().mT @ solved.double()
    gram = (gram + gram.mT) / 2
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return routines.solve(gram + gamma * eye, gram).diagonal().clamp(0, 1)
