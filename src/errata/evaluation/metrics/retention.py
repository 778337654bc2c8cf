"""Whether edits of a sequence last: success of edit i while n are in place, by age n - i.

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
"""Where strata of age begin: half decades, the newest edit alone."""


@dataclass(frozen=True)
class Recalled:
    """One edit, asked for while several are in place."""

    edit: int
    """Its place in the sequence, from 1."""
    edits: int
    """How many edits are in place."""
    right: float
    """Whether it was recalled, or the share of its probes that were."""

    @property
    def age(self) -> int:
        """How many edits came after it."""
        return self.edits - self.edit


@dataclass(frozen=True)
class Stratum:
    """Edits of about one age, over all looks."""

    youngest: int
    oldest: int
    """Oldest age found; strata of edits have no other end."""
    right: float
    n: int


@dataclass(frozen=True)
class Health:
    """What is known of a host with ``edits`` in place; None where it was not measured."""

    edits: int
    efficacy: float | None = None
    """Share of its edits that free generation answers right."""
    perplexity_ratio: float | None = None
    """Perplexity of neutral text over that of the unedited host."""
    repetition: float | None = None
    """Share of repeated 4-grams in its open texts."""


def recall_of(rows: Iterable[Row], kind: str = EFFICACY) -> float | None:
    """Return the share of probes that ask for the edit itself and are right by free generation; None of none."""
    right = [row.after for row in rows if _asks_edit(row, kind)]
    return sum(right) / len(right) if right else None


def _asks_edit(row: Row, kind: str) -> bool:
    return row.kind == kind and row.protocol == GENERATE


def recalled(table: Iterable[Row], order: Sequence[str], *, kind: str = EFFICACY) -> list[Recalled]:
    """Read off the rows of a sequence how each edit was recalled at each checkpoint, by free generation.

    ``order``: ids of the cases as they were edited. Rows of other kinds and protocols, and rows without
    ``detail["checkpoint"]``, are passed over.
    """
    places = {case: place for place, case in enumerate(order, 1)}
    right: dict[tuple[int, int], list[float]] = {}
    for row in table:
        edits = row.detail.get("checkpoint")
        if edits is not None and _asks_edit(row, kind):
            right.setdefault((edits, places[row.case]), []).append(row.after)
    return [Recalled(edit, edits, sum(of) / len(of)) for (edits, edit), of in sorted(right.items())]


def by_age(seen: Iterable[Recalled]) -> dict[int, float]:
    """Return the mean success at each age found, over all looks, in order of age."""
    ages: dict[int, list[float]] = {}
    for one in seen:
        ages.setdefault(one.age, []).append(one.right)
    return {age: sum(successes) / len(successes) for age, successes in sorted(ages.items())}


def strata(seen: Iterable[Recalled], starts: Sequence[int] = STRATA) -> list[Stratum]:
    """Return the mean success by strata of age, those that hold an edit; ``starts`` ascend from 0."""
    bins: dict[int, list[Recalled]] = {}
    for one in seen:
        bins.setdefault(max(start for start in starts if start <= one.age), []).append(one)
    return [
        Stratum(start, max(o.age for o in held), sum(o.right for o in held) / len(held), len(held))
        for start, held in sorted(bins.items())
    ]


def past(seen: Iterable[Recalled]) -> dict[int, float]:
    """Return ERR at each look: the mean over all edits in place, by how many they are.

    GRACE's edit retention. Its code averages over the edits before the newest one too; the newest one is
    among them here, so a look at one edit has a value.
    """
    looks: dict[int, list[float]] = {}
    for one in seen:
        looks.setdefault(one.edits, []).append(one.right)
    return {edits: sum(successes) / len(successes) for edits, successes in sorted(looks.items())}


def area(curve: Iterable[tuple[float, float]]) -> float:
    """Return the area under a curve over log n, divided by its length: a mean in which decades weigh alike.

    ``curve``: pairs of n >= 1 and value, as of :func:`past`. Trapezoids; of one point it is the value. Raises
    ValueError of none, or of an n below 1.
    """
    points = sorted(curve)
    if not points or points[0][0] < 1:
        raise ValueError(f"expected points at n >= 1, found {points[:1] or 'none'}")
    if len(points) == 1:
        return points[0][1]
    steps = [(math.log(right[0] / left[0]), (left[1] + right[1]) / 2) for left, right in pairwise(points)]
    return sum(step * height for step, height in steps) / sum(step for step, _ in steps)


def collapse_point(
    looks: Iterable[Health], *, tau: float = 0.5, limits: collapse.Limits | None = None
) -> int | None:
    """Return CP: the smallest number of edits at which the host counts as collapsed; None if it never does.

    Efficacy below ``tau`` of the best so far, perplexity above ``limits.perplexity`` of the unedited host's,
    repetition above ``limits.repetition``, or a number that is not finite. Of the best *so far*, so what
    happens later does not move the point.
    """
    bounds = limits or collapse.Limits()
    best = 0.0
    for look in sorted(looks, key=lambda look: look.edits):
        numbers = [n for n in (look.efficacy, look.perplexity_ratio, look.repetition) if n is not None]
        if not all(map(math.isfinite, numbers)):
            return look.edits
        if look.efficacy is not None:
            best = max(best, look.efficacy)
            if look.efficacy < tau * best:
                return look.edits
        if look.perplexity_ratio is not None and look.perplexity_ratio > bounds.perplexity:
            return look.edits
        if look.repetition is not None and look.repetition > bounds.repetition:
            return look.edits
    return None
