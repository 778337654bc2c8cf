"""Changes of states h ``[n, d]`` that steer them: along a vector, at low rank, by projection, by rotation, by features.

Each takes a strength s and returns other states ``[n, d]``; s = 0 gives h. All are differentiable in their parameters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from errata.linalg import routines


def along(h: Tensor, vector: Tensor, strength: float) -> Tensor:
    """Return h + s v; ``vector`` ``[d]`` or ``[n, d]``."""
    return h + strength * vector


def piecewise(h: Tensor, vector: Tensor, strength: float) -> Tensor:
    """Return h + s sign(h.v) v, v ``[d]``: states move on to the side on which they are (RepE, arXiv 2310.01405)."""
    return h + strength * (h @ vector).sign()[:, None] * vector


def low_rank(
    h: Tensor, left: Tensor, right: Tensor, bias: Tensor, drop: Tensor | float, strength: float
) -> Tensor:
    """Return h + s (left (right h + bias) - drop h).

    ``left`` ``[d, r]``, ``right`` ``[r, d]``, ``bias`` ``[r]``; ``drop`` is a number, 1 for a map that replaces h.
    """
    return h + strength * ((h @ right.mT + bias) @ left.mT - drop * h)


def project(h: Tensor, basis: Tensor, target: Tensor, strength: float) -> Tensor:
    """Return h + s B^T (target - B h): with s = 1 the coordinates along orthonormal rows B ``[r, d]`` are ``[r]``."""
    return h + strength * (target - h @ basis.mT) @ basis


def rotate(h: Tensor, plane: Tensor, degrees: Tensor | float) -> Tensor:
    """Return states rotated by an angle in a plane, from its first orthonormal row ``[2, d]`` towards its second."""
    angle = torch.as_tensor(degrees, dtype=h.dtype, device=h.device) * (math.pi / 180)
    x, y = (h @ plane.mT).unbind(-1)
    cosine, sine = angle.cos(), angle.sin()
    change = torch.stack([cosine * x - sine * y - x, sine * x + cosine * y - y], -1)
    return h + change @ plane


def turn_to(h: Tensor, plane: Tensor, degrees: Tensor | float, strength: float) -> Tensor:
    """Return states whose part in a plane ``[2, d]`` keeps its length and turns to an angle from the first row.

    With s = 1 this is h - P h + |P h| (cos t b1 + sin t b2), as Angular Steering (arXiv 2510.26243) has it; with less,
    a share s of the shorter way there is gone.
    """
    target = torch.as_tensor(degrees, dtype=h.dtype, device=h.device) * (math.pi / 180)
    x, y = (h @ plane.mT).unbind(-1)
    length, now = torch.hypot(x, y), torch.atan2(y, x)
    way = torch.remainder(target - now + math.pi, 2 * math.pi) - math.pi
    angle = now + strength * way
    change = torch.stack([length * angle.cos() - x, length * angle.sin() - y], -1)
    return h + change @ plane


def clamp_features(
    h: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, decoder: Tensor, target: Tensor, strength: float
) -> Tensor:  # fmt: skip
    """Return h + s (target - a(h)) D, a(h) the features' activations.

    ``encoder`` and ``decoder`` D ``[r, d]``; ``bias``, ``threshold``, ``target`` ``[r]``.
    """
    return h + strength * (target - activations(h, encoder, bias, threshold)) @ decoder


def activations(h: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """Return features ``[n, r]``: E h + b where that is above the threshold (0: ReLU, else JumpReLU), 0 elsewhere."""
    raw = h @ encoder.mT + bias
    return torch.where(raw > threshold, raw, torch.zeros_like(raw))


def with_norms_of(changed: Tensor, h: Tensor) -> Tensor:
    """Return states ``[n, d]`` scaled to the norms of others."""
    tiny = torch.finfo(changed.dtype).tiny
    return changed * (routines.norm(h, -1)[..., None] / routines.norm(changed, -1)[..., None].clamp_min(tiny))


# --- directions -----------------------------------------------------------------------------


def unit(vector: Tensor) -> Tensor:
    """Return a vector ``[d]`` of length 1. Raises ValueError for one of zeros."""
    length = float(routines.norm(vector))
    if not length > 0:
        raise ValueError("the two sides have the same states: there is no direction between them")
    return vector / length


def principal(differences: Tensor) -> Tensor:
    """Return the first principal direction ``[d]`` of differences ``[n, d]`` and their negatives, so about 0.

    Its sign is that of the mean difference. Raises ValueError where all differences are 0.
    """
    _, values, vectors = routines.svd(differences.double())
    if not float(values[0]) > 0:
        raise ValueError("the two sides have the same states: there is no direction between them")
    direction = vectors[0]
    return -direction if float(differences.double().mean(0) @ direction) < 0 else direction


def orthonormal_rows(matrix: Tensor) -> Tensor:
    """Return orthonormal rows that span those of ``[r, d]``, differentiable in them; r at most d."""
    q, r = routines.qr(matrix.mT)
    return (q * r.diagonal().sign()).mT  # so that rows that are orthonormal already stay as they are


def plane(first: Tensor, candidates: Tensor) -> Tensor:
    """Return an orthonormal plane ``[2, d]``: a direction ``[d]``, and the first principal one of others beside it.

    ``candidates`` ``[n, d]``: their parts orthogonal to the first count. Raises ValueError where they have none.
    """
    b1 = unit(first.double())
    rest = candidates.double() - (candidates.double() @ b1)[:, None] * b1
    scale = float(routines.norm(candidates.double(), 1).max())
    if not float(routines.norm(rest, 1).max()) > 1e-9 * scale:
        raise ValueError("all candidate directions are one: they span no plane")
    b2 = principal(rest)
    b2 = unit(b2 - (b2 @ b1) * b1)
    return torch.stack([b1, b2])


# --- conceptors -----------------------------------------------------------------------------


def conceptor(second: Tensor, aperture: float) -> Tensor:
    """Return C = R (R + aperture^-2 I)^-1 of a second moment R ``[d, d]``: symmetric, eigenvalues from 0 to below 1."""
    values, vectors = routines.eigh(second.double())
    values = values.clamp_min(0)
    return (vectors * (values / (values + aperture**-2))) @ vectors.mT


def conceptor_not(c: Tensor) -> Tensor:
    """Return NOT C = I - C, ``[d, d]``."""
    return torch.eye(len(c), dtype=c.dtype, device=c.device) - c


def conceptor_and(c: Tensor, other: Tensor) -> Tensor:
    """Return C AND D = (C^-1 + D^-1 - I)^-1, ``[d, d]``; singular ones by their limit, on the range that both have."""
    width = len(c)
    ranges = [_range(one) for one in (c, other)]
    # the common range is what neither has in its kernel
    outside = sum((torch.eye(width, dtype=c.dtype, device=c.device) - u @ u.mT for u in ranges), 0 * c)
    values, vectors = routines.eigh(outside)
    common = vectors[:, values < 1e-6]
    if not common.shape[1]:
        return 0 * c
    inverses = [routines.pseudo_inverse(one) for one in (c, other)]
    inner = (
        common.mT @ (inverses[0] + inverses[1] - torch.eye(width, dtype=c.dtype, device=c.device)) @ common
    )
    return common @ routines.pseudo_inverse(inner) @ common.mT


def conceptor_or(c: Tensor, other: Tensor) -> Tensor:
    """Return C OR D = NOT (NOT C AND NOT D), ``[d, d]``."""
    return conceptor_not(conceptor_and(conceptor_not(c), conceptor_not(other)))


def factors(symmetric: Tensor, *, share: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return left ``[d, r]`` and right ``[r, d]`` of a symmetric matrix ``[d, d]``.

    Eigenvalues below ``share`` of the largest are dropped; one is kept at least.
    """
    values, vectors = routines.eigh(symmetric)
    kept = values.abs() > share * values.abs().max()
    kept[-1] = True
    return vectors[:, kept] * values[kept], vectors[:, kept].mT


def _range(c: Tensor) -> Tensor:
    values, vectors = routines.eigh(c)
    return vectors[:, values > 1e-9]
