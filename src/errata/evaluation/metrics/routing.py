"""Routing drift: the share of sets of experts that an edit changes, for probes that must not change.

A mixture of experts routes each token of a layer to a few experts. An edit leaves the routing of its own layer as it
is and shifts what the layers above read, so that their tokens may go elsewhere. Counted are pairs of a prompt's token
and a layer; one counts as changed where any of its experts is another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from errata.evaluation.metrics._metric import SHARE, Metric, ProbeResult
from errata.types import Row

NAME = "routing"
Sets = Sequence[Sequence[int]]
"""Per layer and token, a set of experts as a number."""


def drift(pairs: Iterable[tuple[Sets, Sets]]) -> float | None:
    """Return the share of sets that differ between before and after, over texts; None where there are none."""
    changed = total = 0
    for before, after in pairs:
        for old, new in zip(before, after, strict=True):
            changed += sum(a != b for a, b in zip(old, new, strict=True))
            total += len(old)
    return changed / total if total else None


def rows(result: ProbeResult) -> list[Row]:
    """Compare the routes of a probe's prompt; empty where the model has no stacked experts."""
    before, after = result.before.routes, result.after.routes
    if not before or not after:
        return []
    by_layer = [drift([([old], [new])]) or 0.0 for old, new in zip(before, after, strict=True)]
    return [result.row(NAME, 0.0, drift([(before, after)]) or 0.0, by_layer=by_layer)]


METRIC = Metric(
    name=NAME,
    label="Routing drift",
    title="Routing drift: tokens and layers whose set of experts changes, %",
    unit=SHARE,
    higher_is_better=False,
    compares=True,
    forms=frozenset({"short"}),
    rows=rows,
    order=4,
)
