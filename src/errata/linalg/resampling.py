"""Percentile bootstrap of means, and least squares with nested models: pure functions of numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from errata.linalg import routines

RESAMPLES = 2000
LEVEL = 0.95


def draws(count: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Tensor:
    """Return which of ``count`` items each resample holds, with repetition, int64 ``[resamples, count]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (resamples, count), generator=generator)


def interval(statistics: Tensor, *, level: float = LEVEL) -> tuple[Tensor, Tensor]:
    """Return the percentile interval of resampled statistics ``[resamples, ...]``: lower and upper ``[...]``."""
    tail = (1 - level) / 2
    low, high = torch.quantile(statistics.double(), torch.tensor([tail, 1 - tail]).double(), dim=0)
    return low, high


def mean_interval(values: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a bootstrap interval of the mean over the first axis of ``[n, ...]``: lower and upper ``[...]``."""
    picked = draws(len(values), resamples=resamples, seed=seed)
    weights = torch.zeros(len(picked), len(values), dtype=torch.float64)
    weights.scatter_add_(1, picked, torch.full_like(picked, 1, dtype=torch.float64))
    flat = values.reshape(len(values), -1).double()
    low, high = interval(weights @ flat / len(values))
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def resampled(count: int, statistic: Callable[[Tensor], Tensor], *, resamples: int, seed: int = 0) -> Tensor:
    """Return a statistic ``[...]`` of each resample of ``count`` items, given their indices, ``[resamples, ...]``."""
    return torch.stack([statistic(picked) for picked in draws(count, resamples=resamples, seed=seed)])


def explained(design: Tensor, target: Tensor) -> float:
    """Return R2, the share of the variance of a target ``[n]`` that least squares on a design ``[n, m]`` explains.

    NaN for a target without variance.
    """
    design, target = design.double(), target.double()
    total = (target - target.mean()).square().sum()
    solution = routines.least_squares(design, target[:, None])  # of columns that others imply, too
    rest = (target - (design @ solution)[:, 0]).square().sum()
    return float(1 - rest / total) if float(total) > 0 else float("nan")


def correlation(one: Tensor, other: Tensor) -> float:
    """Return Pearson's correlation of two ``[n]``; NaN where either has no variance."""
    one, other = (part.double() - part.double().mean() for part in (one, other))
    scale = (one.square().sum() * other.square().sum()).sqrt()
    return float((one * other).sum() / scale) if float(scale) > 0 else float("nan")


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each of ``[n]``, from 0, equal values sharing the mean of theirs; float64."""
    order = values.sort().values
    below, upto = (torch.searchsorted(order, values, right=right) for right in (False, True))
    return (below + upto - 1).double() / 2


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Return Spearman's correlation of two ``[n]``; NaN where either has no variance."""
    return correlation(ranks(one), ranks(other))
