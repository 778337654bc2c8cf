"""Count right answers by free generation: one pass over a cell's rows, whatever they are needed for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from errata.evaluation.metrics import headline_metric
from errata.report.read import Cell, number

Counts = Mapping[str, Mapping[str, tuple[float, int]]]
"""By case, in the order they were asked, then by kind: how many were right, and of how many."""


@dataclass(frozen=True)
class Tally:
    """Right answers of one cell."""

    looks: Mapping[int | None, Counts]
    """By the number of edits in place; None: each case's own alone."""
    changes: Mapping[str, bool]
    """By kind, whether any of its probes is meant to change."""

    @property
    def last(self) -> Counts:
        """The counts with all edits in place."""
        if not self.looks:
            return {}
        return self.looks[max(self.looks, key=lambda edits: -1 if edits is None else edits)]


def tally(cell: Cell) -> Tally:
    """Count a cell's right answers. What must stay is counted among what was right before."""
    protocol = headline_metric().name
    looks: dict[int | None, dict[str, dict[str, tuple[float, int]]]] = {}
    changes: dict[str, bool] = {}
    for record in cell.records():
        edits = record.get("edits") if cell.sequence else None
        mine = looks.setdefault(edits, {}).setdefault(str(record.get("case")), {})
        for row in record.get("rows") or ():
            after = number(row["after"]) if row["protocol"] == protocol else None
            if after is None:
                continue
            kind = row["kind"]
            meant = bool((row.get("detail") or {}).get("changes", True))
            changes[kind] = changes.get(kind, False) or meant
            if meant or row["before"]:
                total, count = mine.get(kind, (0.0, 0))
                mine[kind] = (total + after, count + 1)
    return Tally(looks, changes)
