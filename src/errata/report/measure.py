"""The record of a measured number with its interval, used in every table and chart."""

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
    """The value for the unedited host."""
    n: int | None = None
    """Number of probes in the average."""
    more: Mapping[str, float] = field(default_factory=dict)
    """Further numbers of the same summary entry: the columns of the metric."""
