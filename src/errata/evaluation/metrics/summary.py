"""Averages of rows: by kind and metric, as scores of papers, and paired differences of two methods.

Loads neither torch nor a model, so that reports can use it on result files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from errata.evaluation.metrics import REGISTRY, intervals, metric_of, propagation
from errata.evaluation.metrics._metric import (
    Metric,
    PaperScore,
    Side,
    Summary,
    averages,
    by_case,
    numbers_with_sides,
)
from errata.evaluation.metrics.intervals import Difference
from errata.types import Row


def summarise(table: Iterable[Row], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Average rows by kind and metric, as ``{"<kind>.<metric>": {before, after, n, ci, ...}}``.

    For probes whose answer must not change, ``before`` is the share right before and ``after`` the share still
    right among those; ``n`` is the number of rows in ``after``. ``ci`` is a 95 % bootstrap interval of ``after``
    over cases, ``[None, None]`` where there is none. ``macro_before``, ``macro_after``: over all rows, first within
    a case, then over cases, as papers average.

    Further numbers depend on the metric: see ``summary`` in its file, and :class:`Metric` for the default.
    """
    return {name: _entry(group, seed) for name, group in _group(table).items()}


def paired(first: Iterable[Row], second: Iterable[Row], *, seed: int = 0) -> dict[str, Difference]:
    """Compare two methods on the same cases, by ``"<kind>.<metric>"``: second minus first, with interval.

    Each table has the rows of one method, in a sequence of one checkpoint. Values are those that ``after`` of
    :func:`summarise` averages; entries without a common case are left out.
    """
    a, b = _relevant_by_case(first), _relevant_by_case(second)
    differences = {name: intervals.paired(a[name], b[name], seed=seed) for name in a if name in b}
    return {name: difference for name, difference in differences.items() if difference is not None}


def _relevant_by_case(table: Iterable[Row]) -> dict[str, dict[str, list[float]]]:
    return {
        name: by_case(_relevant(group, metric_of(group[0].protocol))) for name, group in _group(table).items()
    }


def _group(table: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in table:
        groups.setdefault(f"{row.kind}.{row.protocol}", []).append(row)
    return groups


def _relevant(rows: Sequence[Row], metric: Metric) -> list[Row]:
    """Return the rows to average: answers that must not change but were wrong before cannot show damage."""
    if not metric.judges:
        return list(rows)
    return [row for row in rows if row.detail.get("changes", True) or row.before > 0]


def _entry(rows: list[Row], seed: int) -> dict[str, Any]:
    metric = metric_of(rows[0].protocol)
    relevant = _relevant(rows, metric)
    interval = intervals.bootstrap(list(by_case(relevant).values()), seed=seed)
    entry: dict[str, Any] = {
        "before": intervals.mean([row.before for row in rows]),
        "after": intervals.mean([row.after for row in relevant]),
        "n": len(relevant),
        "ci": list(interval) if interval else [None, None],
        "macro_before": intervals.macro(list(by_case(rows, lambda row: row.before).values())),
        "macro_after": intervals.macro(list(by_case(rows).values())),
    }
    if metric.summary is not None:
        entry |= metric.summary(rows, relevant)
    elif not metric.judges:
        entry |= {"mean": entry["after"], **averages(rows, numbers_with_sides(rows))}
    return entry


def paper_scores() -> list[PaperScore]:
    """List the paper scores of all metrics, in the order of tables."""
    scores = [score for metric in REGISTRY.values() for score in metric.scores]
    return sorted(scores, key=lambda score: score.order)


def legacy_scores(summary: Summary, *, side: Side = "after") -> dict[str, float]:
    """Return the scores of papers, with their names and units, that can be computed from the summary.

    Averaged as in papers, over all rows and first within a case; ``side`` "before": the unedited host. Each
    metric's file explains its scores: :mod:`preference` (ROME, CounterFact+, EVOKE), :mod:`teacher_forced` (zsRE,
    EasyEdit), :mod:`generate` (MQuAKE, CKL), :mod:`longform` (UnKE), :mod:`article` (FRUIT), :mod:`choice` and
    :mod:`perplexity` (ECBD), :mod:`fluency`, :mod:`divergence` and :mod:`bias`.
    """
    values = {score.name: score.value(summary, side) for score in paper_scores()}
    return {name: value for name, value in values.items() if value is not None}


def rome_scores(summary: Summary) -> dict[str, float]:
    """Return ROME's ES, PS, NS and their harmonic mean S, in per cent, from a summary."""
    scores = legacy_scores(summary)
    return {name: scores[name] for name in ("ES", "PS", "NS", "S") if name in scores}


def ripple_scores(table: Iterable[Row]) -> dict[str, float]:
    """Return RippleEdits' criteria in per cent, over the tests of cases whose edit succeeded.

    Tests whose conditions the unedited host failed have no row. Averaged per case, then over cases; ``mean``: over
    the criteria.
    """
    examples: dict[str, dict[str, list[bool]]] = {}
    for row in table:
        kind, _, need = row.kind.rpartition(".")
        if kind in propagation.CRITERIA and need in ("any", "all") and row.detail.get("edited"):
            examples.setdefault(row.case, {}).setdefault(kind, []).append(row.after > 0)
    shares = propagation.criteria(list(examples.values()))
    order = (*(name for name in propagation.CRITERIA if name in shares), "mean")
    return {name: 100 * shares[name] for name in order if name in shares}
