"""Read contrast pairs from a file: records of ``prompt``, ``positive``, ``negative`` and optionally ``subject``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from errata.data import _records
from errata.types import ContrastPair, Contrasts

FIELDS = ("prompt", "positive", "negative", "subject")


def read_contrasts(path: Path, name: str | None = None) -> Contrasts:
    """Read contrast pairs; ``name``: of the behaviour, None: the file's. Raises RequestError listing every faulty
    record, DataError for the file."""
    pairs = _records.read_all(path, _pair)
    return Contrasts(path.stem if name is None else name, tuple(pairs))


def write_contrasts(path: Path, pairs: Iterable[ContrastPair]) -> int:
    """Write contrast pairs as JSON lines; return their number. The file appears only when it is complete."""
    return _records.write_all(path, pairs, FIELDS)


def _pair(value: Any) -> tuple[ContrastPair | None, list[str]]:
    wrong = _records.faults(value, FIELDS, FIELDS[1:3])
    if wrong:
        return None, wrong
    pair = ContrastPair(value.get("prompt") or "", value["positive"], value["negative"], value.get("subject"))
    return pair, pair.problems()
