"""Streaming moments of vectors: count, mean, uncentred second moment and an estimate of its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.linalg import routines

BLOCK = 256
"""Width of a block column of the second moment."""
EXACT = 2
"""Up to so many vectors for each entry products are computed in float64 throughout."""
CHUNK = 2048
"""Most vectors in one float32 product; longer sums are computed in float64."""


@dataclass
class Moments:
    """Running sums over vectors of width ``m``; chunks are multiplied in float32 and summed in float64.

    The first ``EXACT`` m vectors are multiplied in float64, too, so that few vectors give an exact moment.

    The sum of outer products is symmetric, so only the blocks on and below its diagonal are computed
    and stored: about half of the work and of the memory.
    """

    count: int
    total: Tensor
    """Sum of vectors, float64 ``[m]``."""
    columns: tuple[Tensor, ...]
    """Sum of outer products by block columns, float64 ``[m - i, min(BLOCK, m - i)]`` for each start i,
    from the diagonal block downwards."""
    parts: int = 0
    """How many chunks were added."""
    squares: float = 0.0
    """Sum over chunks b of ||G_b||_F^2 / n_b, with G_b a chunk's sum of outer products of n_b vectors."""

    @staticmethod
    def empty(width: int, device: torch.device | str = "cpu") -> Moments:
        """Return the sums of no vectors."""
        columns = (
            torch.zeros(width - i, min(BLOCK, width - i), dtype=torch.float64, device=device)
            for i in range(0, width, BLOCK)
        )
        return Moments(0, torch.zeros(width, dtype=torch.float64, device=device), tuple(columns))

    def update_(self, vectors: Tensor) -> None:
        """Add vectors ``[n, m]``, in equal chunks; multiplied where they are, summed where the sums are.

        Float32 products are never computed in TF32 or bfloat16, whatever the program allows elsewhere.
        """
        vectors = vectors.detach()
        vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
        count = vectors.shape[0]
        if not count:
            return
        if self.count < EXACT * self.total.shape[0]:
            vectors = (
                vectors.double()
            )  # of low rank still: float32's rounding would make eigenvalues below zero
        self.count += count
        self.total += vectors.sum(0, dtype=torch.float64).to(self.total.device)
        with full_precision():
            for chunk in vectors.tensor_split(-(-count // CHUNK)):
                self.parts += 1
                self.squares += float(self._add_(chunk)) / chunk.shape[0]

    def _add_(self, chunk: Tensor) -> Tensor:
        """Add one product; return its ||G_b||_F^2."""
        size = chunk.new_zeros((), dtype=torch.float64)
        for k, column in enumerate(self.columns):
            below = chunk[:, k * BLOCK :]
            product = below.mT @ below[:, :BLOCK]  # [m - i, BLOCK]
            column += product.to(column.device)
            size += _size(product)
        return size

    def to(self, device: torch.device | str) -> Moments:
        """Return a copy on a device."""
        columns = tuple(column.to(device, copy=True) for column in self.columns)
        return replace(self, total=self.total.to(device, copy=True), columns=columns)

    @property
    def mean(self) -> Tensor:
        """Mean vector ``[m]``."""
        return self.total / max(1, self.count)

    @property
    def second(self) -> Tensor:
        """Uncentred second moment E[k k^T], ``[m, m]``, exactly symmetric; assembled at each call."""
        width = self.total.shape[0]
        full = self.total.new_empty(width, width)
        for k, column in enumerate(self.columns):
            start, stop = k * BLOCK, k * BLOCK + column.shape[1]
            diagonal, below = column.split_with_sizes([stop - start, width - stop])
            full[start:stop, start:stop] = diagonal.tril() + diagonal.tril(-1).mT
            full[stop:, start:stop] = below
            full[start:stop, stop:] = below.mT
        return full.div_(max(1, self.count))

    @property
    def effective_rank(self) -> float:
        """tr(C)^2 / ||C||_F^2: in how many directions the vectors lie, were these equally strong."""
        size = self._size()
        return self._trace() ** 2 / size if size else 0.0

    def remaining_error(self) -> float | None:
        """Estimate ||C_T - C||_F / ||C||_F: how far the moment so far is from that of an endless corpus.

        Read off the spread between the chunks' own moments C_b: with V their variance per vector,
        E sum_b n_b ||C_b - C_T||^2 = (B - 1) V and E||C_T - C||^2 = V / T. A chunk counts as one
        observation, so it does not matter how alike the vectors of a text are; texts much longer than
        a chunk make the error larger than estimated. The sum is over every chunk: a sample of them
        would leave the part of the spread that is linear in C, larger than the rest, uncancelled.
        None where there are too few chunks to tell.
        """
        if self.parts < 2:
            return None
        size = self._size()
        variance = max(0.0, self.squares - size / self.count) / (self.parts - 1)
        error = variance / self.count
        true = size / self.count**2 - error  # ||C_T||^2 is larger than ||C||^2 by the error
        return math.sqrt(error / true) if true > 0 else None

    def _trace(self) -> float:
        return sum(float(column[: column.shape[1]].diagonal().sum()) for column in self.columns)

    def _size(self) -> float:
        """||sum of outer products||_F^2."""
        return sum(float(_size(column)) for column in self.columns)


def _size(column: Tensor) -> Tensor:
    """Squared norm of a symmetric matrix's block column, what is below the diagonal block counted twice."""
    width = column.shape[1]
    diagonal, below = (
        routines.norm(part, dtype=torch.float64)
        for part in column.split_with_sizes([width, column.shape[0] - width])
    )
    return diagonal.square() + 2 * below.square()


@contextmanager
def full_precision() -> Generator[None, None, None]:
    """Multiply float32 matrices in float32 inside the block: no TF32 on CUDA, no bfloat16 on a CPU.

    Both are switches of the whole program; they are as before on exit. Run nothing else inside.
    """
    with ExitStack() as stack:
        for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)):
            # newer releases name a precision per backend and refuse to mix that with the older switch
            for switch, exact in (("fp32_precision", "ieee"), ("allow_tf32", False)):
                if hasattr(backend, switch):
                    stack.callback(setattr, backend, switch, getattr(backend, switch))
                    setattr(backend, switch, exact)
                    break
        yield


@dataclass(frozen=True)
class Eigen:
    """Eigendecomposition of a symmetric matrix: ``vectors @ diag(values) @ vectors.mT``."""

    values: Tensor
    """Ascending, float64 ``[m]``; those of a singular moment may lie slightly below zero. ``[E, m]`` of E blocks."""
    vectors: Tensor
    """Orthonormal, one a column, float64 ``[m, m]``; ``[E, m, m]`` of E blocks."""


def eigen(matrix: Tensor) -> Eigen:
    """Decompose a symmetric matrix ``[m, m]``, or each of ``[E, m, m]``, in float64; about 9 m^3 operations."""
    if matrix.ndim == 3:
        each = [eigen(block) for block in matrix]
        return Eigen(torch.stack([one.values for one in each]), torch.stack([one.vectors for one in each]))
    matrix = matrix.double()
    values, vectors = routines.eigh((matrix + matrix.mT) / 2)
    # contiguous, as once saved and loaded: products with it then have the same bits
    return Eigen(values, vectors.contiguous())


def condition(matrix: Tensor) -> float:
    """Estimate the largest over the smallest eigenvalue of a second moment ``[m, m]``.

    Subspace iteration with the matrix and with its Cholesky factor, a tenth of the cost of all
    eigenvalues; never above the true value, and within a few per cent of it. Infinite where the matrix
    is singular to the precision of its numbers, as it is after fewer than m vectors. Of blocks ``[E, m, m]``
    the largest of theirs.
    """
    if matrix.ndim == 3:
        return max(condition(block) for block in matrix)
    matrix = matrix.double()
    width = matrix.shape[0]
    factor = routines.cholesky(matrix)
    if factor is None:
        return math.inf
    start = torch.randn(width, min(8, width), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start = start.to(matrix.device)
    largest = _largest(lambda basis: matrix @ basis, start)
    smallest = 1 / _largest(lambda basis: routines.cholesky_solve(factor, basis), start)
    resolved = smallest > largest * width * torch.finfo(torch.float64).eps
    return largest / smallest if resolved else math.inf


def _largest(apply: Callable[[Tensor], Tensor], basis: Tensor, steps: int = 30) -> float:
    """Find the largest eigenvalue of a positive definite map from a starting basis ``[m, p]``."""
    for _ in range(steps):
        basis = routines.qr(apply(basis))[0]
    small = basis.mT @ apply(basis)
    return float(routines.eigenvalues((small + small.mT) / 2)[-1])
