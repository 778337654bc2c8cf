"""Read contrast pairs from a file: records of ``prompt``, ``positive``, ``negative`` and optionally ``subject``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from errata import files
from errata.data.sets._files import read_records
from errata.errors import RequestError, listing, shown
from errata.types import ContrastPair, Contrasts

FIELDS = ("prompt", "positive", "negative", "subject")


def read_contrasts(path: Path, name: str | None = None) -> Contrasts:
    """Read contrast pairs; ``name``: of the behaviour, None: the file's. Raises RequestError listing every faulty
    record, DataError for the file."""
    pairs, wrong = list[ContrastPair](), list[str]()
    for record in read_records(path):
        pair, why = _pair(record.value)
        wrong += [f"{record.where}: {one}" for one in why]
        pairs += [] if pair is None else [pair]
    if wrong:
        raise RequestError(f"{path}: {len(wrong):,} problem{'s' * (len(wrong) > 1)}\n{listing(wrong)}")
    return Contrasts(path.stem if name is None else name, tuple(pairs))


def write_contrasts(path: Path, pairs: Iterable[ContrastPair]) -> int:
    """Write contrast pairs as JSON lines; return their number. The file appears only when it is complete."""
    count = 0
    with files.replacing(path, RequestError) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            count += 1
            record = {name: getattr(pair, name) for name in FIELDS if getattr(pair, name) is not None}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return count


def _pair(value: Any) -> tuple[ContrastPair | None, list[str]]:
    if not isinstance(value, Mapping):
        return None, [f"expected a record with positive and negative, found {shown(value, 60)}"]
    unknown = [
        f"unknown field {shown(key)}; expected {', '.join(FIELDS)}" for key in value if key not in FIELDS
    ]
    wrong = unknown + [f"missing {name}" for name in FIELDS[1:3] if name not in value]
    wrong += [
        f"{name} must be a text, found {shown(value[name], 60)}"
        for name in FIELDS
        if value.get(name) is not None and not isinstance(value[name], str)
    ]
    if wrong:
        return None, wrong
    pair = ContrastPair(value.get("prompt") or "", value["positive"], value["negative"], value.get("subject"))
    return pair, pair.problems()
