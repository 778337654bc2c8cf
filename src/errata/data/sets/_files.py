"""Read the additional files of a dataset (not its cases), in any supported format."""

from __future__ import annotations

from pathlib import Path

from errata.data._base import Malformed, Record
from errata.data.formats import layout, rows


def read_records(path: Path) -> list[Record]:
    """Return the records of a file. Raises DataError where it cannot be read, Malformed at a broken one."""
    records = []
    for index, row in enumerate(rows(path, layout(path))):
        if row.fault:
            raise Malformed(f"{path}, {row.where}: {row.fault}")
        records.append(Record(row.value, f"{path}, {row.where}", index))
    return records
