"""Changes of a weight, thin or dense, and the weight with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from errata.linalg.lowrank import LowRank

Delta = LowRank | Tensor
"""A change of a weight, thin factors or a whole tensor, in the weight's shape; of a weight that stacks several matrices
also one matrix, see :func:`fits`."""


def fits(shape: tuple[int, ...], weight: torch.Size) -> bool:
    """Whether a delta of a shape, oriented as the weight is stored, is one of a weight's.

    A weight ``[a, b, ...]`` counts as the matrix ``[a, b ...]``, as a convolution; one of three axes also as matrices
    stored one above the other, ``[a b, c]``, or to be set side by side, ``[b, a c]``, as stacked experts.
    """
    if tuple(weight) == shape:
        return True
    if len(weight) < 3 or len(shape) != 2:
        return False
    flat = (weight[0], weight[1:].numel())
    return shape == flat or (len(weight) == 3 and (shape == _above(weight) or _side_by_side(shape, weight)))


def _above(weight: torch.Size) -> tuple[int, int]:
    return weight[0] * weight[1], weight[2]


def _side_by_side(shape: tuple[int, ...], weight: torch.Size) -> bool:
    """Whether a shape is that of a stack's matrices side by side; never where it could be a convolution's."""
    return weight[0] != weight[1] and shape == (weight[1], weight[0] * weight[2])


@torch.no_grad()
def weight_with(
    base: Tensor, deltas: Mapping[str, Delta], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Add deltas to a base ``[...]`` in float32 or wider, in the order of their keys, and cast once."""
    value = base.to(device)
    if deltas:
        value = value.to(torch.promote_types(torch.promote_types(base.dtype, dtype), torch.float32))
        for key in sorted(deltas):
            value = value + dense(deltas[key], value)
    return value.to(dtype)


def dense(delta: Delta, like: Tensor) -> Tensor:
    """Return a delta as a tensor in the shape ``[...]`` of its weight, float32 or wider, on the weight's device."""
    wide = torch.promote_types(like.dtype, torch.float32)
    delta = delta.to(device=like.device, dtype=wide)
    matrix = delta.dense() if isinstance(delta, LowRank) else delta
    if matrix.ndim == 2 and like.ndim == 3 and _side_by_side(tuple(matrix.shape), like.shape):
        return matrix.reshape(-1, like.shape[0], like.shape[2]).transpose(0, 1)
    return matrix.reshape(like.shape)
