"""The metrics, one or a few related ones per file; see :class:`errata.evaluation.metrics._metric.Metric`.

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
    """Return the metric of a protocol; for an unknown one, e.g. of an older file, a plain default metric."""
    return REGISTRY.find(name) or Metric(name, name.replace("_", " "))


def headline_metric() -> Metric:
    """Return the metric that reports rank by."""
    return next(metric for metric in REGISTRY.values() if metric.headline)
