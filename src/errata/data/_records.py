"""What files of records of plain texts share: reading each with every fault named, and writing them whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from errata import files
from errata.data.sets._files import read_records
from errata.errors import RequestError, listing, shown

T = TypeVar("T")


def read_all(path: Path, parse: Callable[[Any], tuple[T | None, list[str]]]) -> list[T]:
    """Read every record; ``parse`` returns what it is, or None, and its faults. Raises RequestError listing all
    faulty records, DataError for the file."""
    read, wrong = list[T](), list[str]()
    for record in read_records(path):
        one, why = parse(record.value)
        wrong += [f"{record.where}: {text}" for text in why]
        read += [] if one is None else [one]
    if wrong:
        raise RequestError(f"{path}: {len(wrong):,} problem{'s' * (len(wrong) > 1)}\n{listing(wrong)}")
    return read


def write_all(path: Path, records: Iterable[Any], fields: Sequence[str]) -> int:
    """Write the fields of records that are set as JSON lines; return their number. The file appears when complete."""
    count = 0
    with files.replacing(path, RequestError) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        for one in records:
            count += 1
            record = {name: getattr(one, name) for name in fields if getattr(one, name) is not None}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return count


def faults(value: Any, fields: Sequence[str], needed: Sequence[str]) -> list[str]:
    """Return what is wrong with a record whose fields are texts, those ``needed`` among them."""
    if not isinstance(value, Mapping):
        return [f"expected a record with {' and '.join(needed)}, found {shown(value, 60)}"]
    wrong = [
        f"unknown field {shown(key)}; expected {', '.join(fields)}" for key in value if key not in fields
    ]
    wrong += [f"missing {name}" for name in needed if name not in value]
    return wrong + [
        f"{name} must be a text, found {shown(value[name], 60)}"
        for name in fields
        if value.get(name) is not None and not isinstance(value[name], str)
    ]
