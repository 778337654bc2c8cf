"""KL divergence of the next-token distribution before and after an edit, for probes that must not change, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from errata.evaluation.metrics import intervals
from errata.evaluation.metrics._metric import (
    Column,
    Metric,
    PaperScore,
    ProbeResult,
    Side,
    Summary,
    averages,
)
from errata.types import Row

if TYPE_CHECKING:
    from torch import Tensor

NAME = "kl"


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of two distributions given as log-probabilities ``[vocab]``, in nats.

    A token that p excludes adds nothing; one that only q excludes makes it infinite. NaN stays NaN.
    """
    p, q = p.double(), q.double()
    terms = (p.exp() * (p - q)).masked_fill(p == -math.inf, 0.0)
    return float(terms.sum().clamp_min(0.0))


def both(before: Tensor, after: Tensor) -> tuple[float, float]:
    """KL(before || after) and KL(after || before) of log-probabilities ``[vocab]``, in nats.

    The first is large where the edited model gives low probability to likely tokens of the unedited one, the second
    where it gives high probability to tokens that are unlikely under the unedited one.
    """
    return kl(before, after), kl(after, before)


def nkl_legacy(before: Tensor, after: Tensor) -> float:
    """CounterFact+'s NKL in the unit of its tables (arXiv 2305.17553): KL(after || before) / |V|.

    Quirk reproduced: the paper writes KL(before || after), its code computes the other direction, and averages over
    the vocabulary because it takes the mean over the first dimension of a vector. Multiplied by |V| it is :func:`kl`
    in nats. Log-probabilities ``[vocab]``.
    """
    return kl(after, before) / before.shape[-1]


def rows(result: ProbeResult) -> list[Row]:
    """Compare the next-token distributions; empty where they were not observed."""
    old, new = result.before.next_logprobs, result.after.next_logprobs
    if old is None or new is None:
        return []
    forward, reverse = both(old, new)
    return [result.row(NAME, 0.0, forward, reverse=reverse, nkl_legacy=nkl_legacy(old, new))]


def summary(rows: Sequence[Row], relevant: Sequence[Row]) -> dict[str, Any]:
    """Return mean and 95th percentile of both directions, and the average ``nkl_legacy``."""
    values = [row.after for row in rows]
    reverse = [row.detail["reverse"] for row in rows if "reverse" in row.detail]
    return {
        "mean": intervals.mean(values),
        "p95": intervals.quantile(values, 0.95),
        "reverse": intervals.mean(reverse),
        "reverse_p95": intervals.quantile(reverse, 0.95),
        **averages(rows, ("nkl_legacy",)),
    }


def _nkl(name: str, kind: str) -> PaperScore:
    """Define CounterFact+'s NKL for a kind, in the published unit; there is none for the unedited host."""

    def value(summary: Summary, side: Side) -> float | None:
        return summary.get(f"{kind}.{NAME}", {}).get("nkl_legacy") if side == "after" else None

    return PaperScore(name, value, order=10)


METRIC = Metric(
    name=NAME,
    label="KL",
    title="KL divergence of the next-token distribution, before from after, nats",
    unit="nats",
    higher_is_better=False,
    compares=True,
    forms=frozenset({"short"}),
    rows=rows,
    summary=summary,
    columns=(Column("p95"),),
    scores=(_nkl("NKL", "neighbourhood"), _nkl("NKL+", "distracting")),
    order=3,
    heading="KL, nats",
    heading_kinds=("neighbourhood",),
)
