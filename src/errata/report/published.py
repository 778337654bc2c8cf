"""Published tables beside what was measured: always with their provenance, and only where they are comparable."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.evaluation.metrics.intervals import mean
from errata.report.board import Board, Entry
from errata.report.read import Run, number

PROVENANCE = {
    "confirmed": "confirmed in the primary source",
    "secondary": "as quoted by a secondary source, not checked against the original",
    "memory": "from memory only: figures are not shown",
}


MISSING = 0.05
"""Share of a sequence's or a batch's edits that may be missing, as rows that a loader cannot take are."""


@dataclass(frozen=True)
class Line:
    """One published score beside the measured one."""

    method: str
    score: str
    published: float | None
    """None where the figure is from memory only."""
    provenance: str
    measured: float | None
    """In the papers' unit; None where nothing comparable was measured."""
    within: bool | None
    """Whether the two agree within the table's tolerance; None where that cannot be said."""

    @property
    def difference(self) -> float | None:
        """Measured minus published."""
        if self.measured is None or self.published is None:
            return None
        return self.measured - self.published


@dataclass(frozen=True)
class Comparison:
    """One published table, with what one board has of it."""

    title: str
    source: str
    setting: str
    """Model, dataset and schedule of the published table."""
    provenance: str
    convention: str
    """What the published scores mean."""
    tolerance: float | None
    board: str | None
    """Title of the board that is comparable; None where none is."""
    lines: tuple[Line, ...]


def comparisons(runs: Sequence[Run], boards: Sequence[Board]) -> list[Comparison]:
    """Put every published table of the runs beside each comparable board, or alone where there is none."""
    tables: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        for table in run.document.get("published") or ():
            if isinstance(table, Mapping):
                tables.setdefault(str(table.get("name") or table.get("title")), table)
    made = []
    for table in tables.values():
        fitting = [board for board in boards if comparable(table, board)]
        made += [_comparison(table, board) for board in fitting or [None]]
    return made


def comparable(table: Mapping[str, Any], board: Board) -> bool:
    """Whether a board measures what a published table does: same model, dataset and schedule.

    Models are compared by the last part of their names, datasets without their number of cases; but where
    edits stand together, about as many must: a score after 100 edits says nothing about one after 10,000.
    """
    together, edits = _together(table), board.tag.get("edits")
    return (
        _bare(str(table.get("model", "")).rpartition("/")[2]) == _bare(board.model.rpartition("/")[2])
        and _dataset(table.get("dataset")) == _dataset(board.tag.get("dataset"))
        and _bare(str(table.get("schedule", ""))) == _bare(board.schedule)
        and (together is None or edits is None or abs(edits - together) <= MISSING * together)
    )


def _together(table: Mapping[str, Any]) -> int | None:
    """Return how many edits of a published table stand together; None where it does not say."""
    kind, _, size = str(table.get("schedule", "")).partition(":")
    if kind == "sequential":
        size = str(table.get("dataset", "")).rpartition(":")[2]
    return int(size) if size.isdecimal() else None


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.casefold())


def _dataset(source: Any) -> str:
    """Return a dataset's bare name: without file, number of cases, and what was put beside its questions."""
    return _bare(re.split(r"[:@]| \+ ", str(source or ""))[0])


def _comparison(table: Mapping[str, Any], board: Board | None) -> Comparison:
    provenance = str(table.get("provenance", "memory"))
    tolerance = number(table.get("tolerance"))
    lines: list[Line] = []
    for row in table.get("rows") or ():
        mine = str(row.get("provenance") or provenance)
        entries = _entries(row, board)
        scores = {str(k): number(v) for k, v in (row.get("scores") or {}).items()}
        for name, value in scores.items():
            measured = _measured(entries, name)
            shown = None if mine == "memory" else value
            within = None
            if shown is not None and measured is not None and tolerance is not None:
                within = abs(shown - measured) <= tolerance + 1e-9
            lines.append(Line(str(row.get("method")), name, shown, mine, measured, within))
    setting = " · ".join(str(table[k]) for k in ("model", "dataset", "schedule") if table.get(k))
    return Comparison(
        str(table.get("title") or table.get("name")), str(table.get("source", "")), setting, provenance,
        str(table.get("metric_convention") or "").strip(), tolerance, board.title if board else None, tuple(lines),
    )  # fmt: skip


def _entries(row: Mapping[str, Any], board: Board | None) -> list[Entry]:
    """Find the lines that a published one is about, one for each seed.

    By the cell's label, else by errata's name of the method: the cell without settings of its own, else the only
    one there is. Which of several does best never matters.
    """
    entries = board.entries if board else ()
    labelled = [e for e in entries if e.cell.name == row.get("method")]
    if labelled:
        return labelled
    registered = [e for e in entries if e.cell.method == row.get("errata_method")]
    found = [e for e in registered if not e.cell.plan.get("settings")] or registered
    return found if len({e.cell.name for e in found}) == 1 else []


def _measured(entries: Sequence[Entry], name: str) -> float | None:
    """Average a legacy score, by its paper's name, over seeds; cells keep them in the papers' units."""
    found = [number((entry.cell.found.get("scores") or {}).get(name)) for entry in entries]
    return mean([value for value in found if value is not None])
