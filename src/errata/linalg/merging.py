"""Several changes of weights merged into one: trimming, random drops, sign election."""

from __future__ import annotations

import torch
from torch import Tensor


def ties(changes: Tensor, *, density: float = 1.0, majority: bool = False) -> Tensor:
    """Merge changes ``[n, ...]`` by TIES: trim, elect signs, take the mean of those that agree.

    Of each change the share ``density`` of entries is kept, the largest; an entry's sign is that of the sum of what is
    left; the result is the mean of the entries with that sign. ``majority``: entries whose sum is zero take the sign of
    the sum of all signs, as the authors' code has it; else they are left out. Source: Yadav et al., "TIES-Merging",
    NeurIPS 2023, arXiv 2306.01708, Algorithm 1, with scale 1.
    """
    trimmed = trim(changes.reshape(len(changes), -1), density)
    sign = trimmed.sum(0).sign()
    if majority:
        sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agree = (trimmed.sign() == sign) & (sign != 0)
    merged = torch.where(agree, trimmed, 0).sum(0) / agree.sum(0).clamp_min(1)
    return merged.reshape(changes.shape[1:])


def trim(changes: Tensor, density: float) -> Tensor:
    """Keep the share ``density`` of each row's entries ``[n, m]``, the largest by magnitude; set others to zero.

    At least one of each row; entries equal to the smallest that is kept are kept too.
    """
    count = max(1, round(density * changes.shape[1]))
    least = changes.abs().topk(count, dim=1).values[:, -1:]  # [n, 1]
    return torch.where(changes.abs() >= least, changes, 0)


def dare(change: Tensor, *, drop: float, generator: torch.Generator) -> Tensor:
    """Set entries of a change ``[...]`` to zero with probability ``drop`` and divide the others by 1 - drop.

    The expected value is the change itself. Drawn on the CPU, so that a seed gives the same on every device. Source: Yu
    et al., "Language Models are Super Mario", ICML 2024, arXiv 2311.03099, Eq. 2.
    """
    kept = torch.rand(change.shape, generator=generator) >= drop
    return torch.where(kept.to(change.device), change / (1 - drop), 0)


def breadcrumbs(change: Tensor, *, smallest: float, largest: float) -> Tensor:
    """Set the share ``smallest`` of the smallest entries of each row, and ``largest`` of the largest, to zero.

    Rows are along the last axis of ``[..., m]``, entries counted by magnitude; shares of a row are rounded down.
    Source: Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024, arXiv 2312.06795, Sec. 3; rows as in their code.
    """
    length = change.shape[-1]
    low, high = int(smallest * length), length - int(largest * length)
    order = change.abs().argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(length, device=order.device).expand_as(order)
    )
    return torch.where((rank >= low) & (rank < high), change, 0)
