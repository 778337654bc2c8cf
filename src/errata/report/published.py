"""Compare published tables with measured scores: always with their provenance, and only where comparable."""

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
"""Share of the edits of a sequence or batch that may be missing, such as rows that a loader skips."""


@dataclass(frozen=True)
class Line:
    """A published score and the measured one."""

    method: str
    score: str
    published: float | None
    """None if the figure is from memory only."""
    provenance: str
    measured: float | None
    """In the papers' unit; None where nothing comparable was measured."""
    within: bool | None
    """Whether the two agree within the table's tolerance; None where either or the tolerance is missing."""

    @property
    def difference(self) -> float | None:
        """Measured minus published."""
        if self.measured is None or self.published is None:
            return None
        return self.measured - self.published


@dataclass(frozen=True)
class Comparison:
    """A published table with the measured scores of one board."""

    title: str
    source: str
    setting: str
    """Model, dataset and schedule of the published table."""
    provenance: str
    convention: str
    """The definition of the published scores."""
    tolerance: float | None
    board: str | None
    """Title of the comparable board; None where there is none."""
    lines: tuple[Line, ...]


def comparisons(runs: Sequence[Run], boards: Sequence[Board]) -> list[Comparison]:
    """Pair every published table of the runs with each comparable board, or with None where there is none."""
    tables: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        for table in run.document.get("published") or ():
            if isinstance(table, Mapping):
                tables.setdefault(str(table.get("name") or table.get("title")), table)
    result = []
    for table in tables.values():
        matches = [board for board in boards if comparable(table, board)]
        result += [_comparison(table, board) for board in matches or [None]]
    return result


def comparable(table: Mapping[str, Any], board: Board) -> bool:
    """Whether a board measures what a published table does: same model, dataset and schedule.

    Models are compared by the last part of their names, datasets without their number of cases. For batches and
    sequences the number of edits must be about the same: scores after 100 and after 10,000 edits are not comparable.
    """
    together, edits = _together(table), board.tag.get("edits")
    return (
        _bare(str(table.get("model", "")).rpartition("/")[2]) == _bare(board.model.rpartition("/")[2])
        and _dataset(table.get("dataset")) == _dataset(board.tag.get("dataset"))
        and _bare(str(table.get("schedule", ""))) == _bare(board.schedule)
        and (together is None or edits is None or abs(edits - together) <= MISSING * together)
    )


def _together(table: Mapping[str, Any]) -> int | None:
    """Return the number of edits in place together in a published table; None where it is not stated."""
    kind, _, size = str(table.get("schedule", "")).partition(":")
    if kind == "sequential":
        size = str(table.get("dataset", "")).rpartition(":")[2]
    return int(size) if size.isdecimal() else None


def _bare(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.casefold())


def _dataset(source: Any) -> str:
    """Return a dataset's bare name: without file, number of cases and additional probes."""
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
            measured_score = _measured_score(entries, name)
            published_score = None if mine == "memory" else value
            within = None
            if published_score is not None and measured_score is not None and tolerance is not None:
                within = abs(published_score - measured_score) <= tolerance + 1e-9
            lines.append(Line(str(row.get("method")), name, published_score, mine, measured_score, within))
    setting = " · ".join(str(table[k]) for k in ("model", "dataset", "schedule") if table.get(k))
    return Comparison(
        str(table.get("title") or table.get("name")), str(table.get("source", "")), setting, provenance,
        str(table.get("metric_convention") or "").strip(), tolerance, board.title if board else None, tuple(lines),
    )  # fmt: skip


def _entries(row: Mapping[str, Any], board: Board | None) -> list[Entry]:
    """Return the entries that correspond to a published row, one for each seed.

    By the cell's label, else by errata's name of the method: the cell without settings of its own, else the only
    one. The best of several is never picked.
    """
    entries = board.entries if board else ()
    by_label = [e for e in entries if e.cell.name == row.get("method")]
    if by_label:
        return by_label
    by_method = [e for e in entries if e.cell.method == row.get("errata_method")]
    matches = [e for e in by_method if not e.cell.plan.get("settings")] or by_method
    return matches if len({e.cell.name for e in matches}) == 1 else []


def _measured_score(entries: Sequence[Entry], name: str) -> float | None:
    """Return the mean of a legacy score over seeds, in the papers' unit."""
    scores = [number((entry.cell.result.get("scores") or {}).get(name)) for entry in entries]
    return mean([value for value in scores if value is not None])
