"""Count right answers by free generation, in one pass over a cell's rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from errata.evaluation.metrics import headline_metric
from errata.report.read import Cell, number

Counts = Mapping[str, Mapping[str, tuple[float, int]]]
"""By case, in order, then by kind: the number of right answers and of all answers."""


@dataclass(frozen=True)
class Tally:
    """Right answers of one cell."""

    checkpoints: Mapping[int | None, Counts]
    """By the number of edits in place; None: each case's own edit alone."""
    changes: Mapping[str, bool]
    """By kind, whether the answer of any of its probes must change."""

    @property
    def last(self) -> Counts:
        """The counts with all edits in place."""
        if not self.checkpoints:
            return {}
        return self.checkpoints[max(self.checkpoints, key=lambda edits: -1 if edits is None else edits)]


def tally(cell: Cell) -> Tally:
    """Count a cell's right answers; for answers that must not change, among those right before."""
    protocol = headline_metric().name
    by_edits: dict[int | None, dict[str, dict[str, tuple[float, int]]]] = {}
    changes: dict[str, bool] = {}
    for record in cell.records():
        edits = record.get("edits") if cell.sequence else None
        mine = by_edits.setdefault(edits, {}).setdefault(str(record.get("case")), {})
        for row in record.get("rows") or ():
            after = number(row["after"]) if row["protocol"] == protocol else None
            if after is None:
                continue
            kind = row["kind"]
            changing = bool((row.get("detail") or {}).get("changes", True))
            changes[kind] = changes.get(kind, False) or changing
            if changing or row["before"]:
                total, count = mine.get(kind, (0.0, 0))
                mine[kind] = (total + after, count + 1)
    return Tally(by_edits, changes)
