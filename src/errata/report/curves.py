"""How a method wears in a sequence: success by the age of an edit, and what is left after so many edits."""

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
    """Edits of about the same age: how many later edits were in place when they were asked for."""

    first: int
    last: int
    """Youngest and oldest age that was seen."""
    success: Measure
    """Share that free generation still answers with the target."""


@dataclass(frozen=True)
class Look:
    """What was found with so many edits in place."""

    edits: int
    efficacy: Measure | None
    """Over all edits so far, by free generation."""
    newest: float | None
    """The same over the edits made last."""
    perplexity: float | None
    """Of neutral text, per token; infinite where the host's numbers overflow."""
    perplexity_before: float | None
    norm_ratio: float | None
    """Largest relative Frobenius change among the edited weights."""
    alarms: tuple[str, ...]
    """Reasons why the host counts as collapsed."""


@dataclass(frozen=True)
class Curves:
    """The curves of one cell."""

    retention: tuple[Age, ...]
    looks: tuple[Look, ...]


def curves(cell: Cell, tally: Tally) -> Curves | None:
    """Read a cell's curves off its looks and its right answers; None where it was no sequence."""
    if not cell.sequence or not cell.looks:
        return None
    seen: dict[int, list[tuple[str, float]]] = {}
    for edits, cases in tally.looks.items():
        shares = [
            (case, counts[EFFICACY][0] / counts[EFFICACY][1])
            for case, counts in cases.items() if EFFICACY in counts
        ]  # fmt: skip
        if edits is not None and shares:
            seen[edits] = shares
    looks = tuple(_look(look, seen.get(look["edits"], [])) for look in cell.looks)
    return Curves(_retention(seen), looks)


def _retention(seen: Mapping[int, Sequence[tuple[str, float]]]) -> tuple[Age, ...]:
    """Pool all looks by age: the edit in place ``i``, asked after ``n``, has age ``n - i``."""
    strata: dict[int, list[tuple[int, str, float]]] = {}
    for edits, cases in seen.items():
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


def _look(look: Mapping[str, Any], cases: Sequence[tuple[str, float]]) -> Look:
    ratios = look.get("norm_ratio")
    values = [number(v) for v in ratios.values()] if isinstance(ratios, Mapping) else [number(ratios)]
    known = [value for value in values if value is not None]
    return Look(
        edits=int(look["edits"]),
        efficacy=_share(cases) if cases else None,
        newest=number(look.get("last_batch_efficacy")),
        perplexity=number(look.get("perplexity_after")),
        perplexity_before=number(look.get("perplexity_before")),
        norm_ratio=max(known, default=None),
        alarms=_alarms(look.get("collapse")),
    )


def _alarms(collapse: Any) -> tuple[str, ...]:
    found = collapse.get("alarm") if isinstance(collapse, Mapping) else None
    return tuple(map(str, found or ()))


def _share(cases: Sequence[tuple[str, float]]) -> Measure:
    """Average by case with a 95 % percentile interval over resampled cases."""
    groups: dict[str, list[float]] = {}
    for case, success in cases:
        groups.setdefault(case, []).append(success)
    values = [success for _, success in cases]
    low, high = intervals.bootstrap(list(groups.values())) or (None, None)
    return Measure(sum(values) / len(values), low, high, n=len(values))
