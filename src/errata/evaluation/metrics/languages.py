"""Languages: how edits made in each language hold in each language, as matrices of averages.

Rows of cases whose request and probes tell their languages say, in their detail, in which one the edit was made
(``edited_in``) and in which the question was asked (``asked_in``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from errata.evaluation.metrics import intervals
from errata.evaluation.metrics.summary import summarise
from errata.types import Row

CROSS = "cross_"
"""What kinds of probes begin with that ask in another language than the request's."""

Matrix = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Entries of :func:`errata.evaluation.metrics.summary.summarise` by the language edited in, and by that asked in."""


def matrices(table: Iterable[Row], protocol: str = "generate", *, seed: int = 0) -> dict[str, Matrix]:
    """Average the rows of a protocol by kind of probe and languages; kinds are named without ``cross_``."""
    groups: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for row in table:
        if row.protocol == protocol and "asked_in" in row.detail:
            of_kind = groups.setdefault(row.kind.removeprefix(CROSS), {})
            asked = of_kind.setdefault(row.detail["edited_in"], {})
            asked.setdefault(row.detail["asked_in"], []).append(row)
    return {
        kind: {
            edited: {
                name: next(iter(summarise(_alike(rows), seed=seed).values())) for name, rows in asked.items()
            }
            for edited, asked in of_kind.items()
        }
        for kind, of_kind in groups.items()
    }


def _alike(rows: list[Row]) -> list[Row]:
    """Give rows one kind, so that they are averaged together."""
    return [Row(r.case, "asked", r.protocol, r.prompt, r.before, r.after, r.detail) for r in rows]


def transfer(matrix: Matrix) -> float | None:
    """Return the mean of a matrix beside its diagonal over that on it; None where there is nothing to divide by."""
    own = [
        entry["after"] for edited, row in matrix.items() for asked, entry in row.items() if asked == edited
    ]
    other = [
        entry["after"] for edited, row in matrix.items() for asked, entry in row.items() if asked != edited
    ]
    above, below = intervals.mean(other), intervals.mean(own)
    return above / below if above is not None and below else None
