"""Affine maps that take what a linear classifier could read of labels out of vectors: LEACE, its oracle, SAL, INLP.

All work on vectors X ``[n, d]`` and labels Z ``[n, c]`` (one-hot, or any numbers), in float64. After an eraser r the
covariance of r(X) and Z is zero, so that no linear predictor of Z from r(X) is better than a constant (LEACE, Theorem
3.1); INLP ends where its classifiers find nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from errata.linalg import routines
from errata.linalg.classifiers import accuracy, fit_logistic

NEGLIGIBLE = 1e-9
"""Directions with less than this share of the largest singular value are rounding errors."""


@dataclass(frozen=True)
class Eraser:
    """The map r(x) = x - A B^T (x - mean), of rank k below the identity. B^T A = I, so r(r(x)) = r(x)."""

    A: Tensor
    """``[d, k]``: the directions that are moved along."""
    B: Tensor
    """``[d, k]``: the directions that are read."""
    mean: Tensor
    """``[d]``: the vector that stays as it is."""

    @property
    def rank(self) -> int:
        """Number of directions that are erased."""
        return self.A.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        """Return vectors ``[..., d]`` with the directions erased, in their own precision."""
        a, b, mean = (part.to(x.device, x.dtype) for part in (self.A, self.B, self.mean))
        return x - ((x - mean) @ b) @ a.mT


@dataclass(frozen=True)
class OracleEraser:
    """The map x - S_xz S_zz^+ (z - mean of z), which knows each vector's label: no map that erases changes less."""

    slope: Tensor
    """``[d, c]``."""
    mean: Tensor
    """Mean label ``[c]``."""

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """Return vectors ``[n, d]`` of labels ``[n, c]`` with what the labels explain linearly taken off."""
        return x - (z.to(x) - self.mean.to(x)) @ self.slope.to(x).mT


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return labels, int64 ``[n]``, as float64 ``[n, classes]``."""
    return torch.nn.functional.one_hot(labels, classes).double()


def cross_covariance(x: Tensor, z: Tensor) -> Tensor:
    """Return the covariance ``[d, c]`` of vectors ``[n, d]`` and labels ``[n, c]``, with n - 1, float64."""
    x, z = _centred(x), _centred(z)
    return x.mT @ z / max(1, len(x) - 1)


def leace(x: Tensor, z: Tensor, *, shrink: bool = False, tolerance: float = 0.0) -> Eraser:
    """Return the eraser that changes vectors ``[n, d]`` least in mean square, among all affine ones (Theorem 4.3).

    A = W^+ U and B = W U with the whitening W = S_xx^-1/2 and U the left singular vectors of W S_xz. Labels are
    whitened too, which leaves the span of U as it is and makes the singular values canonical correlations. ``shrink``:
    shrink S_xx towards a multiple of the identity by the optimal linear rule, for few vectors; it is then still
    erased exactly, with a larger change. ``tolerance``: canonical correlations (0 to 1) that may stay; 0 erases all.
    Raises ValueError for fewer than two vectors or numbers that do not match.
    """
    _check(x, z)
    centred = _centred(x)
    second = centred.mT @ centred / len(x)
    if shrink:
        second = _shrunk(second, len(x))
    values, vectors = routines.eigh(second)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    values, vectors = values[kept].sqrt(), vectors[:, kept]
    scaled = centred.mT @ _whitened(z) / len(x)  # [d, r_z]
    u, s, _ = routines.svd((vectors.mT @ scaled) / values[:, None])  # in the eigenbasis [r, r_z]
    u = u[:, _significant(s, tolerance)]
    return Eraser(vectors @ (values[:, None] * u), vectors @ (u / values[:, None]), x.double().mean(0))


def oracle(x: Tensor, z: Tensor) -> OracleEraser:
    """Return the eraser that reads the labels: the least that any erasing must change (Theorem 4.2).

    Vectors ``[n, d]``, labels ``[n, c]``. Raises ValueError as :func:`leace` does.
    """
    _check(x, z)
    values, vectors = routines.eigh(cross_covariance(z, z))  # singular for one-hot labels
    vectors = vectors[:, values > NEGLIGIBLE * values[-1].clamp_min(1e-300)]
    values = values[values > NEGLIGIBLE * values[-1].clamp_min(1e-300)]
    slope = cross_covariance(x, z) @ vectors / values @ vectors.mT
    return OracleEraser(slope, z.double().mean(0))


def sal(x: Tensor, z: Tensor, *, rank: int | None = None) -> Eraser:
    """Return the orthogonal eraser of the left singular vectors of S_xz (SAL): LEACE without whitening.

    ``rank``: how many; None: all that are not zero. Vectors ``[n, d]``, labels ``[n, c]``. Raises ValueError as
    :func:`leace` does.
    """
    _check(x, z)
    u, s, _ = routines.svd(cross_covariance(x, z))
    u = u[:, _significant(s, 0.0)][:, :rank]
    return Eraser(u, u, x.double().mean(0))


def inlp(
    x: Tensor, labels: Tensor, classes: int, *, rounds: int = 20, margin: float = 0.02, ridge: float = 1e-3
) -> Eraser:  # fmt: skip
    """Return the orthogonal eraser of the rows of linear classifiers, each fitted on what the ones before left (INLP).

    Vectors ``[n, d]``, labels int64 ``[n]``. Ends after ``rounds``, or once a classifier is not better than the
    largest class by more than ``margin``. ``ridge``: of the classifiers. Raises ValueError as :func:`leace` does.
    """
    _check(x, labels[:, None])
    mean = x.double().mean(0)
    left, basis = _centred(x), x.new_zeros(x.shape[1], 0, dtype=torch.float64)
    largest = float(torch.bincount(labels, minlength=classes).max()) / len(labels)
    for _ in range(rounds):
        classifier = fit_logistic(left, labels, classes, ridge=ridge)
        if accuracy(classifier(left), labels) <= largest + margin:
            break
        rows = classifier.weight - classifier.weight.mean(0)  # adding the same to all classes decides nothing
        rows = rows - (rows @ basis) @ basis.mT
        _, s, vh = routines.svd(rows)
        basis = routines.qr(torch.cat([basis, vh[_significant(s, 1e-6)].mT], 1))[0]
        left = _centred(x) - (_centred(x) @ basis) @ basis.mT
    return Eraser(basis, basis, mean)


def mean_square(change: Tensor) -> float:
    """Return the mean squared length of changes ``[n, d]``."""
    return float(change.double().square().sum(-1).mean())


def _whitened(z: Tensor) -> Tensor:
    """Return labels ``[n, c]`` as uncorrelated columns of mean 0 and variance 1 ``[n, r]``, r their rank.

    Columns are standardised before, so that one of a rare label counts like the others; constant ones are left out.
    """
    centred = _centred(z)
    spread = centred.square().mean(0).sqrt()
    centred = centred[:, spread > 0] / spread[spread > 0]
    if not centred.shape[1]:
        return centred
    values, vectors = routines.eigh(centred.mT @ centred / len(z))
    kept = values > NEGLIGIBLE * values[-1]
    return centred @ vectors[:, kept] / values[kept].sqrt()


def _significant(values: Tensor, tolerance: float) -> Tensor:
    """Return which singular values, descending, are neither rounding errors nor tolerated."""
    largest = float(values[0]) if len(values) else 0.0
    return (values > NEGLIGIBLE * largest) & (values > max(tolerance, torch.finfo(values.dtype).eps))


def _shrunk(second: Tensor, count: int) -> Tensor:
    """Return a covariance ``[d, d]`` shrunk towards a multiple of the identity by the optimal linear rule."""
    width = second.shape[0]
    trace = float(second.trace())
    spread = float(second.square().sum()) - trace**2 / width
    share = 1.0 if spread <= 0 else 1 - trace**2 / (count * spread)
    share = min(1.0, max(0.0, share))
    eye = torch.eye(width, dtype=second.dtype, device=second.device)
    return share * second + (1 - share) * (trace / width) * eye


def _centred(values: Tensor) -> Tensor:
    values = values.double()
    return values - values.mean(0)


def _check(x: Tensor, z: Tensor) -> None:
    if x.ndim != 2 or z.ndim != 2 or len(x) != len(z) or len(x) < 2:
        raise ValueError(
            f"expected vectors [n, d] and labels [n, c], n at least 2; found {list(x.shape)}, {list(z.shape)}"
        )
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the vectors hold NaN or infinite numbers")
