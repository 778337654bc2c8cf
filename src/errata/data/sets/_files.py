"""Records of a file that a dataset offers beside its cases, in any format the reader knows."""

from __future__ import annotations

from pathlib import Path

from errata.data._base import Malformed, Record
from errata.data.formats import layout, rows


def records_of(path: Path) -> list[Record]:
    """Return the records of a file. Raises DataError where it cannot be read, Malformed at a broken one."""
    found = []
    for index, row in enumerate(rows(path, layout(path))):
        if row.fault:
            raise Malformed(f"{path}, {row.where}: {row.fault}")
        found.append(Record(row.value, f"{path}, {row.where}", index))
    return found
