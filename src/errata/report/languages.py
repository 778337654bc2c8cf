"""Results by the language that an edit was made in and by the one that was asked in, read from a cell's rows."""

from __future__ import annotations

from collections.abc import Iterator

from errata.evaluation.metrics import headline_metric
from errata.evaluation.metrics.languages import CROSS, Matrix, matrices
from errata.report.read import Cell
from errata.types import Row


def matrices_of(cell: Cell) -> dict[str, Matrix]:
    """Return a cell's averages under the protocol that boards rank by, by kind of probe and languages.

    Of a sequence those with all edits in place. Empty where no probe is in another language than its request.
    """
    if not any(kind.startswith(CROSS) for kind in cell.summary):
        return {}
    return matrices(_rows(cell), headline_metric().name)


def _rows(cell: Cell) -> Iterator[Row]:
    last = max((look["edits"] for look in cell.checkpoints), default=None) if cell.sequence else None
    for record in cell.records():
        if last is None or record.get("edits") == last:
            for row in record.get("rows") or ():
                yield Row(
                    str(record.get("case")), str(row["kind"]), str(row["protocol"]), str(row["prompt"]),
                    float(row["before"]), float(row["after"]), row.get("detail") or {},
                )  # fmt: skip
