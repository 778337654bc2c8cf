"""Curves of sequential editing: success by the age of an edit, and efficacy and perplexity by number of edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.evaluation.metrics import intervals, retention
from errata.report.measure import Measure
from errata.report.read import Cell, number
from errata.report.tally import Tally
from errata.types.kinds import EFFICACY


@dataclass(frozen=True)
class Age:
    """Edits of similar age; the age of an edit is the number of later edits in place."""

    first: int
    last: int
    """Smallest and largest age."""
    success: Measure
    """Share still answered with the target by free generation."""


@dataclass(frozen=True)
class Checkpoint:
    """Measurements with ``edits`` edits in place."""

    edits: int
    efficacy: Measure | None
    """Over all edits so far, by free generation."""
    newest: float | None
    """The same over the most recent edits."""
    perplexity: float | None
    """Of neutral text, per token; infinite if the host's outputs overflow."""
    perplexity_before: float | None
    norm_ratio: float | None
    """Largest relative Frobenius change among the edited weights."""
    alarms: tuple[str, ...]
    """Signs of collapse."""


@dataclass(frozen=True)
class Curves:
    """The curves of one cell."""

    retention: tuple[Age, ...]
    checkpoints: tuple[Checkpoint, ...]


def curves(cell: Cell, tally: Tally) -> Curves | None:
    """Compute a cell's curves from its checkpoints and right answers; None if it is not a sequence."""
    if not cell.sequence or not cell.checkpoints:
        return None
    shares_of: dict[int, list[tuple[str, float]]] = {}
    for edits, cases in tally.checkpoints.items():
        shares = [
            (case, counts[EFFICACY][0] / counts[EFFICACY][1])
            for case, counts in cases.items() if EFFICACY in counts
        ]  # fmt: skip
        if edits is not None and shares:
            shares_of[edits] = shares
    checkpoints = tuple(
        _checkpoint(checkpoint, shares_of.get(checkpoint["edits"], [])) for checkpoint in cell.checkpoints
    )
    return Curves(_retention(shares_of), checkpoints)


def _retention(shares_of: Mapping[int, Sequence[tuple[str, float]]]) -> tuple[Age, ...]:
    """Pool all checkpoints by age: edit ``i``, evaluated after ``n`` edits, has age ``n - i``."""
    strata: dict[int, list[tuple[int, str, float]]] = {}
    for edits, cases in shares_of.items():
        for i, (case, success) in enumerate(cases, 1):
            age = retention.EditRecall(i, edits, success).age
            start = max(start for start in retention.STRATA if start <= age)
            strata.setdefault(start, []).append((age, case, success))
    return tuple(
        Age(
            min(age for age, _, _ in group),
            max(age for age, _, _ in group),
            _share([(case, success) for _, case, success in group]),
        )
        for _, group in sorted(strata.items())
    )


def _checkpoint(record: Mapping[str, Any], cases: Sequence[tuple[str, float]]) -> Checkpoint:
    ratios = record.get("norm_ratio")
    values = [number(v) for v in ratios.values()] if isinstance(ratios, Mapping) else [number(ratios)]
    finite = [value for value in values if value is not None]
    return Checkpoint(
        edits=int(record["edits"]),
        efficacy=_share(cases) if cases else None,
        newest=number(record.get("last_batch_efficacy")),
        perplexity=number(record.get("perplexity_after")),
        perplexity_before=number(record.get("perplexity_before")),
        norm_ratio=max(finite, default=None),
        alarms=_alarms(record.get("collapse")),
    )


def _alarms(collapse: Any) -> tuple[str, ...]:
    reasons = collapse.get("alarm") if isinstance(collapse, Mapping) else None
    return tuple(map(str, reasons or ()))


def _share(cases: Sequence[tuple[str, float]]) -> Measure:
    """Average by case with a 95 % percentile interval over resampled cases."""
    groups: dict[str, list[float]] = {}
    for case, success in cases:
        groups.setdefault(case, []).append(success)
    values = [success for _, success in cases]
    low, high = intervals.bootstrap(list(groups.values())) or (None, None)
    return Measure(sum(values) / len(values), low, high, n=len(values))
