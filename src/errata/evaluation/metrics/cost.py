"""What editing costs: time, memory and bytes, from plain lists of measurements.

Time says nothing without hardware, dtype, batch size and whether statistics were cached; rows name those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from errata.evaluation.metrics.intervals import quantile


@dataclass(frozen=True)
class Spread:
    """A list of measurements in four numbers, in the unit of the list."""

    median: float
    p95: float
    """95th percentile, between neighbours linearly."""
    total: float
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    """Summarise seconds, bytes or the like; None of nothing."""
    middle, high = quantile(values, 0.5), quantile(values, 0.95)
    if middle is None or high is None:
        return None
    return Spread(middle, high, math.fsum(values), len(values))


def overhead(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Return by how much slower an edited host is: median after over median before, minus 1.

    Give latencies of prefill and of decoding apart. Medians, so that one disturbed run does not count. None
    where either list is empty or the median before is 0.
    """
    old, new = quantile(before, 0.5), quantile(after, 0.5)
    return None if not old or new is None else new / old - 1
