"""Several changes of one weight merged into one."""

from __future__ import annotations

import torch
from torch import Tensor


def ties(changes: Tensor, *, density: float = 1.0) -> Tensor:
    """Merge changes ``[n, ...]`` by TIES: trim, elect signs, take the mean of those that agree.

    Of each change the share ``density`` of entries is kept, the largest; an entry's sign is that of the sum of what is
    left; the result is the mean of the entries with that sign. Source: Yadav et al., "TIES-Merging", NeurIPS 2023,
    arXiv 2306.01708, Algorithm 1, with scale 1.
    """
    flat = changes.reshape(len(changes), -1)
    count = max(1, round(density * flat.shape[1]))
    least = flat.abs().topk(count, dim=1).values[:, -1:]  # [n, 1]
    trimmed = torch.where(flat.abs() >= least, flat, 0)
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (sign != 0)
    merged = torch.where(agree, trimmed, 0).sum(0) / agree.sum(0).clamp_min(1)
    return merged.reshape(changes.shape[1:])
