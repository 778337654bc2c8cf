"""A low-rank matrix as a value: the product of two thin factors, multiplied out only by :meth:`LowRank.dense`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errata.linalg import routines


@dataclass(frozen=True)
class LowRank:
    """The matrix ``B @ A`` of shape ``[d_out, d_in]``."""

    B: Tensor
    """Left factor ``[d_out, r]``."""
    A: Tensor
    """Right factor ``[r, d_in]``."""

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"factors {tuple(self.B.shape)} and {tuple(self.A.shape)} do not form a product")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def rank(self) -> int:
        """Columns of the left factor; an upper bound of the true rank."""
        return self.B.shape[1]

    def dense(self) -> Tensor:
        """Multiply out ``[d_out, d_in]``."""
        return self.B @ self.A

    def __matmul__(self, right: Tensor) -> Tensor:
        """Multiply with ``[d_in, n]`` through the thin side."""
        return self.B @ (self.A @ right)

    def __add__(self, other: LowRank) -> LowRank:
        """Add by stacking factors; ranks add."""
        if self.shape != other.shape:
            raise ValueError(f"shapes {self.shape} and {other.shape} differ")
        return LowRank(torch.cat([self.B, other.B], 1), torch.cat([self.A, other.A], 0))

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.B * factor, self.A)

    __rmul__ = __mul__

    def to(self, dtype: torch.dtype | None = None, *, device: torch.device | str | None = None) -> LowRank:
        """Convert or move both factors; None leaves the dtype or the device as it is."""
        return LowRank(self.B.to(device=device, dtype=dtype), self.A.to(device=device, dtype=dtype))

    def norm(self) -> float:
        """Frobenius norm, from two r x r Gram matrices in float64."""
        gram = (self.B.double().mT @ self.B.double()) * (self.A.double() @ self.A.double().mT).mT
        return float(gram.sum().clamp_min(0).sqrt())

    def truncate(self, rank: int) -> tuple[LowRank, float]:
        """Return the best approximation of a rank and the share of squared norm it discards."""
        q_out, q_in, (u, s, vh) = product_svd(self.B, self.A)
        rank = min(rank, s.numel())
        energy = float(s.square().sum())
        share = float(s[rank:].square().sum()) / energy if energy else 0.0
        return LowRank(q_out @ u[:, :rank] * s[:rank], vh[:rank] @ q_in.mT), share

    def cut(self, energy: float) -> LowRank:
        """Keep the leading singular directions of B that hold a share of its squared norm; the factors are balanced.

        Where the rows of A are orthonormal, in any inner product, it is the share of the product's squared norm.
        Computed in float64, returned in the dtype of A.
        """
        u, s, vh = routines.svd(self.B.double())
        total = s.square().sum().clamp_min(torch.finfo(torch.float64).tiny)
        rank = min(len(s), 1 + int((s.square().cumsum(0) / total < energy).sum()))
        return balance(u[:, :rank] * s[:rank], vh[:rank] @ self.A.double()).to(self.A.dtype)


def nearest(matrix: Tensor, rank: int) -> tuple[LowRank, float]:
    """Return the best approximation of a matrix ``[d_out, d_in]`` of a rank, and its error over the matrix's norm.

    Computed in float64, returned in the matrix's dtype with balanced factors.
    """
    u, s, vh = routines.svd(matrix.double())
    rank = min(rank, len(s))
    total = float(routines.norm(s))
    error = float(routines.norm(s[rank:])) / total if total else 0.0
    return balance(u[:, :rank] * s[:rank], vh[:rank]).to(matrix.dtype), error


def without_noise(product: LowRank) -> LowRank:
    """Return a product with its numerical rank: directions below float32's rounding of the strongest are left out.

    Computed in float64 without multiplying out, returned in float32 with balanced factors.
    """
    q_out, q_in, (u, s, vh) = product_svd(product.B.double(), product.A.double())
    rank = max(1, int((s > torch.finfo(torch.float32).eps * s[:1]).sum()))
    return balance(q_out @ u[:, :rank] * s[:rank], vh[:rank] @ q_in.mT).to(torch.float32)


def product_svd(outer: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Return Q_out ``[d, r]``, Q_in ``[m, r]`` and the SVD of the core: U ``[r, r]``, s ``[r]``, V^T ``[r, r]``.

    ``outer`` ``[d, r]`` times ``inner`` ``[r, m]`` is (Q_out U) diag(s) (V^T Q_in^T). Nothing of size ``[d, m]`` is
    made. Where d or m is below r, the axes of the core are shortened to it.
    """
    q_out, r_out = routines.qr(outer)
    q_in, r_in = routines.qr(inner.mT)
    return q_out, q_in, routines.svd(r_out @ r_in.mT)


def balance(outer: Tensor, inner: Tensor) -> LowRank:
    """Pair factors ``[d, r]`` and ``[r, m]`` with equal column norms, so that float32 suits both."""
    scale = (routines.norm(outer, 0) / routines.norm(inner, 1).clamp_min(1e-300)).clamp_min(1e-300).sqrt()
    return LowRank(outer / scale, inner * scale[:, None])
