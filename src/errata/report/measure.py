"""A number with its interval: what every table and chart is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measure:
    """A number with its interval."""

    value: float
    low: float | None = None
    """Lower end of the 95 % interval, from resampled cases."""
    high: float | None = None
    before: float | None = None
    """The same of the unedited host."""
    n: int | None = None
    """How many probes the value averages."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of the summary of the same rows: those that the metric's record names as columns."""
