"""Changes of a weight, thin or dense, and the weight with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from errata.linalg.lowrank import LowRank

Delta = LowRank | Tensor
"""A change of a weight, thin factors or a whole tensor, in the weight's shape."""


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
    return (delta.dense() if isinstance(delta, LowRank) else delta).reshape(like.shape)
