"""Retention of sequential edits: success of edit i while n are in place, by age n - i.

Sources: GRACE (arXiv 2211.11031) for ERR, T-Patcher (arXiv 2301.09785) for edits still right at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from errata.evaluation.metrics import collapse
from errata.evaluation.metrics.generate import NAME as GENERATE
from errata.types import Row
from errata.types.kinds import EFFICACY

STRATA = (0, 1, 10, 32, 100, 316, 1000, 3162, 10_000)
"""Lower bounds of the strata of age: half decades, with the newest edit alone."""


@dataclass(frozen=True)
class EditRecall:
    """The recall of one edit while several are in place."""

    edit: int
    """Its position in the sequence, from 1."""
    edits: int
    """How many edits are in place."""
    right: float
    """Whether it was recalled, or the share of its probes that were recalled."""

    @property
    def age(self) -> int:
        """The number of edits after it."""
        return self.edits - self.edit


@dataclass(frozen=True)
class Stratum:
    """Edits of similar age, over all checkpoints."""

    youngest: int
    oldest: int
    """The largest age in the stratum."""
    right: float
    n: int


@dataclass(frozen=True)
class Health:
    """Measurements of a host with ``edits`` in place; None where not measured."""

    edits: int
    efficacy: float | None = None
    """Share of its edits that are recalled by free generation."""
    perplexity_ratio: float | None = None
    """Perplexity of neutral text relative to the unedited host."""
    repetition: float | None = None
    """Share of repeated 4-grams in its open texts."""


def recall_of(rows: Iterable[Row], kind: str = EFFICACY) -> float | None:
    """Return the share of efficacy probes that are right by free generation; None without such rows."""
    right = [row.after for row in rows if _asks_edit(row, kind)]
    return sum(right) / len(right) if right else None


def _asks_edit(row: Row, kind: str) -> bool:
    return row.kind == kind and row.protocol == GENERATE


def recall_of_edits(table: Iterable[Row], order: Sequence[str], *, kind: str = EFFICACY) -> list[EditRecall]:
    """Compute from the rows of a sequence how each edit was recalled at each checkpoint, by free generation.

    ``order``: ids of the cases in editing order. Rows of other kinds and protocols, and rows without
    ``detail["checkpoint"]``, are ignored.
    """
    places = {case: place for place, case in enumerate(order, 1)}
    right: dict[tuple[int, int], list[float]] = {}
    for row in table:
        edits = row.detail.get("checkpoint")
        if edits is not None and _asks_edit(row, kind):
            right.setdefault((edits, places[row.case]), []).append(row.after)
    return [EditRecall(edit, edits, sum(of) / len(of)) for (edits, edit), of in sorted(right.items())]


def by_age(recalls: Iterable[EditRecall]) -> dict[int, float]:
    """Return the mean success at each age, over all checkpoints, in order of age."""
    ages: dict[int, list[float]] = {}
    for one in recalls:
        ages.setdefault(one.age, []).append(one.right)
    return {age: sum(successes) / len(successes) for age, successes in sorted(ages.items())}


def strata(recalls: Iterable[EditRecall], starts: Sequence[int] = STRATA) -> list[Stratum]:
    """Return the mean success by non-empty stratum of age; ``starts``: ascending lower bounds from 0."""
    bins: dict[int, list[EditRecall]] = {}
    for one in recalls:
        bins.setdefault(max(start for start in starts if start <= one.age), []).append(one)
    return [
        Stratum(start, max(o.age for o in group), sum(o.right for o in group) / len(group), len(group))
        for start, group in sorted(bins.items())
    ]


def mean_by_count(recalls: Iterable[EditRecall]) -> dict[int, float]:
    """Return ERR at each checkpoint: the mean over all edits in place, by their number.

    GRACE's edit retention. Its code excludes the newest edit; here it is included, so that a checkpoint with one
    edit has a value.
    """
    by_count: dict[int, list[float]] = {}
    for one in recalls:
        by_count.setdefault(one.edits, []).append(one.right)
    return {edits: sum(successes) / len(successes) for edits, successes in sorted(by_count.items())}


def area(curve: Iterable[tuple[float, float]]) -> float:
    """Return the area under a curve over log n, divided by its length: a mean with equal weight per decade.

    ``curve``: pairs of n >= 1 and value, as from :func:`mean_by_count`. Trapezoidal rule; the value itself for a
    single point. Raises ValueError without points, or for an n below 1.
    """
    points = sorted(curve)
    if not points or points[0][0] < 1:
        raise ValueError(f"expected points at n >= 1, found {points[:1] or 'none'}")
    if len(points) == 1:
        return points[0][1]
    steps = [(math.log(b[0] / a[0]), (a[1] + b[1]) / 2) for a, b in pairwise(points)]
    return sum(step * height for step, height in steps) / sum(step for step, _ in steps)


def collapse_point(
    checkpoints: Iterable[Health], *, tau: float = 0.5, limits: collapse.Limits | None = None
) -> int | None:
    """Return CP, the collapse point: the smallest number of edits with a sign of collapse; None if there is none.

    Signs: efficacy below ``tau`` of the best so far, perplexity above ``limits.perplexity`` times the unedited
    host's, repetition above ``limits.repetition``, or a number that is not finite. Only the best *so far* counts,
    so later checkpoints do not move the point.
    """
    bounds = limits or collapse.Limits()
    best = 0.0
    for checkpoint in sorted(checkpoints, key=lambda checkpoint: checkpoint.edits):
        numbers = [
            n
            for n in (checkpoint.efficacy, checkpoint.perplexity_ratio, checkpoint.repetition)
            if n is not None
        ]
        if not all(map(math.isfinite, numbers)):
            return checkpoint.edits
        if checkpoint.efficacy is not None:
            best = max(best, checkpoint.efficacy)
            if checkpoint.efficacy < tau * best:
                return checkpoint.edits
        if checkpoint.perplexity_ratio is not None and checkpoint.perplexity_ratio > bounds.perplexity:
            return checkpoint.edits
        if checkpoint.repetition is not None and checkpoint.repetition > bounds.repetition:
            return checkpoint.edits
    return None
