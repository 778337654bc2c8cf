"""Costs of editing: time, memory and bytes, summarised from lists of measurements.

Times are meaningless without hardware, dtype, batch size and whether statistics were cached; rows record those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from errata.evaluation.metrics.intervals import quantile


@dataclass(frozen=True)
class Spread:
    """Summary statistics of measurements, in their unit."""

    median: float
    p95: float
    """95th percentile, linearly interpolated."""
    total: float
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    """Summarise seconds, bytes or the like; None for an empty list."""
    middle, high = quantile(values, 0.5), quantile(values, 0.95)
    if middle is None or high is None:
        return None
    return Spread(middle, high, math.fsum(values), len(values))


def overhead(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Return the slow-down of an edited host: median after over median before, minus 1.

    Give latencies of prefill and of decoding separately. Medians are robust against a single disturbed run. None
    where either list is empty or the median before is 0.
    """
    old, new = quantile(before, 0.5), quantile(after, 0.5)
    return None if not old or new is None else new / old - 1
