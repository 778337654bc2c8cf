"""The metrics: one file each, or a few that belong together; see :class:`errata.evaluation.metrics._metric.Metric`.

Importing the package, or any metric, does not load torch.
"""

from __future__ import annotations

from errata.evaluation.metrics._metric import (
    CaseResult,
    Column,
    Metric,
    PaperScore,
    ProbeResult,
    by_case,
    per_cent,
)
from errata.registry import Records

__all__ = [
    "REGISTRY",
    "CaseResult",
    "Column",
    "Metric",
    "PaperScore",
    "ProbeResult",
    "by_case",
    "headline_metric",
    "metric_of",
    "per_cent",
]

REGISTRY: Records[Metric] = Records(
    "errata.evaluation.metrics", ("METRIC", "METRICS"), Metric, group="errata.metrics",
    order=lambda metric: metric.order,
)  # fmt: skip


def metric_of(name: str) -> Metric:
    """Return the metric of a protocol; one that nothing defines, as of an older file, measures a plain number."""
    return REGISTRY.find(name) or Metric(name, name.replace("_", " "))


def headline_metric() -> Metric:
    """Return the metric that reports rank by."""
    return next(metric for metric in REGISTRY.values() if metric.headline)
