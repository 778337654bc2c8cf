"""Result files: documents that are written atomically, and append-only journals; both contain hashes.

A document's ``seal`` is the hash of its other fields; the document of a finished cell also lists its rows and saved
edits with their hashes. Files of older versions, without seals, are read without verification. Loads the standard
library only, so that reports do not load a model's libraries.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from errata import files
from errata.errors import DataError, brief, shown
from errata.types import Row

SCHEMA = 1
"""Version of the run folder format."""
RUN, JOBS, CELLS, UNEDITED = "run.json", "jobs.sqlite", "cells", "unedited"
"""Files and folders of a run folder; see docs/bench.md."""
JOB_STATES = ("open", "leased", "done", "refused", "failed")
ROWS, CELL, JUDGED = "rows.jsonl", "cell.json", "judged.json"
"""Files of a cell's folder."""
SEAL, FILES = "seal", "files"
"""Fields of a document: the hash of its other fields, and the hashes of the files that belong to it."""
UNTIMED = ("cost", "fit_seconds", SEAL)
"""Fields of a line that its seal does not cover: times differ between equal runs."""


def finite(value: Any) -> Any:
    """Replace numbers that JSON cannot represent by the texts ``inf``, ``-inf`` and ``nan``, which ``float`` reads."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_report(path: str | os.PathLike[str], document: Mapping[str, Any]) -> Path:
    """Write a document as JSON. Raises DataError if the path cannot be written."""
    return files.write(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a regular file atomically. Raises DataError if it cannot be written."""
    return files.write(path, content)


def write_sealed(path: str | os.PathLike[str], document: Mapping[str, Any]) -> Path:
    """Write a document with its seal. Raises DataError if the path cannot be written."""
    plain = _plain(document)
    return write_report(path, {**plain, SEAL: seal_of(plain)})


def read_document(path: Path, *, sealed: bool = False) -> dict[str, Any]:
    """Read a JSON document and remove its seal. Raises DataError if it is missing or damaged.

    ``sealed``: a document without a seal counts as damaged.
    """
    text = files.read_text(path, DataError)
    document = files.parse_json(text, lambda reason: DataError(f"{path} is damaged: {reason}"))
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(document).__name__}")
    seal = document.pop(SEAL, None)
    if (sealed or seal is not None) and seal != seal_of(document):
        raise DataError(f"{path} is damaged: its content does not match its seal")
    return document


def is_sealed(folder: Path) -> bool:
    """Whether a run was created with seals, so that each of its documents must have one."""
    document = files.parse_json(files.read_text(folder / RUN, DataError), DataError)
    return isinstance(document, dict) and SEAL in document


def hashes(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the number of bytes and the hash of some files of a folder, by name; missing files are omitted."""
    return {
        name: {"bytes": path.stat().st_size, "sha256": _file_hash(path)}
        for name in names
        if (path := folder / name).is_file()
    }


def read_sealed(folder: Path, name: str = CELL, *, sealed: bool = False) -> dict[str, Any]:
    """Read a document of a cell, and verify the files it lists. Raises DataError naming the damaged files."""
    document = read_document(folder / name, sealed=sealed)
    listed = document.get(FILES)
    if listed is None and not sealed:
        return document
    damaged = [
        f"{name} {'does not match its hash' if (folder / name).is_file() else 'is gone'}"
        for name, entry in (listed or {}).items()
        if hashes(folder, [name]) != {name: {k: v for k, v in entry.items() if k != "lines"}}
    ]
    if damaged:
        raise DataError(f"its {', its '.join(damaged)}")
    return document


def job_seal(cell: Any, state: Any, reason: Any) -> str:
    """Return the hash of a cell's final state, for the job table."""
    return hashlib.sha256(json.dumps([cell, state, reason], default=repr).encode()).hexdigest()[:16]


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document after a round trip through JSON."""
    return json.loads(json.dumps(finite(document)))


def seal_of(document: Mapping[str, Any]) -> str:
    """Return the hash of a document's fields, independent of their order."""
    plain = {name: value for name, value in document.items() if name != SEAL}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=repr).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    try:
        return files.sha256(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def read_run(folder: Path) -> dict[str, Any]:
    """Read a run's ``run.json``. Raises DataError for a folder that is no run, or whose ``run.json`` is damaged."""
    if not (folder / RUN).is_file():
        raise DataError(
            f"{folder} is no run folder: it contains no {RUN}; make one with: errata bench RECIPE"
        )
    document = read_document(folder / RUN)
    cells = document.get("cells")
    if document.get("schema") == SCHEMA and not (
        isinstance(cells, list) and all(isinstance(cell, dict) and _is_name(cell.get("id")) for cell in cells)
    ):
        raise DataError(f"{folder / RUN} is damaged: cells: expected a list of records with an id")
    return document


def _is_name(value: Any) -> bool:
    """Whether a text is a valid name of a cell's folder."""
    return isinstance(value, str) and value not in ("", ".", "..") and not any(c in value for c in "/\\\0")


def row_of(record: Mapping[str, Any]) -> Row:
    """Build a row from a record; texts such as ``inf`` become numbers. Raises DataError for any other record."""
    try:
        values = {**record, "before": float(record["before"]), "after": float(record["after"])}
        return Row(**values)
    except (TypeError, ValueError, LookupError) as error:
        raise DataError(f"a row is damaged: {brief(str(error))} in {shown(record)}") from error


@dataclass(frozen=True)
class Line:
    """A parsed line of a journal, and the position in the file where it ends."""

    record: dict[str, Any]
    end: int


class Journal:
    """An append-only file of JSON lines; every write is flushed to the disk.

    An incomplete last line, left by a killed process, is ignored; :meth:`cut` removes it. Each line has a hash of its
    content without times, which is verified.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Line]:
        """Yield the complete lines. Raises DataError for one that is not JSON, except the last."""
        if not self.path.exists():
            return
        end, broken_line = 0, None
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if broken_line is not None:
                    raise DataError(
                        f"{self.path}, line {broken_line} is not JSON; remove the file to start its cell again"
                    )
                end += len(line)
                record = _record(line)
                if record is None:
                    broken_line = number
                    continue
                seal = record.pop(SEAL, None)
                if seal is not None and seal != _line_seal(record):
                    raise DataError(
                        f"{self.path}, line {number} is damaged: it does not match its seal; remove the file to start "
                        "its cell again"
                    )
                yield Line(record, end)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of the complete lines."""
        for line in self:
            yield line.record

    def cut(self, end: int) -> None:
        """Truncate the file to its first ``end`` bytes."""
        if self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())

    def append(self, *records: Mapping[str, Any]) -> None:
        """Append lines and wait until they are on the disk. Raises DataError if that fails."""
        lines = [{**plain, SEAL: _line_seal(plain)} for plain in map(_plain, records)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            with self.path.open("ab") as file:
                # half a surrogate pair is written as a JSON escape
                _whole(file, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error


def _line_seal(record: Mapping[str, Any]) -> str:
    return seal_of({name: value for name, value in record.items() if name not in UNTIMED})[:16]


def _whole(file: BinaryIO, data: bytes) -> None:
    """Append all of some bytes or none, also on a full disk or an interrupt."""
    start = file.seek(0, os.SEEK_END)
    try:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(start)
        raise


def _record(line: bytes) -> dict[str, Any] | None:
    """Parse a line; None for an incomplete one."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of thousands of digits
        return None
    return record if isinstance(record, dict) else None
