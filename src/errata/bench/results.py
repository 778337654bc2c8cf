"""Result files: documents written whole or not at all, and journals that grow line by line.

Loads the standard library only, so that a report can read results without a model's libraries.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from errata.errors import DataError
from errata.types import Row

RUN, JOBS, CELLS, UNEDITED = "run.json", "jobs.sqlite", "cells", "unedited"
"""What a run folder holds; see docs/bench.md."""
ROWS, CELL, JUDGED = "rows.jsonl", "cell.json", "judged.json"
"""What a cell's folder holds."""


def finite(value: Any) -> Any:
    """Replace numbers that JSON cannot write by their names: ``inf``, ``-inf``, ``nan``; ``float`` reads them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_report(path: str | os.PathLike[str], document: Mapping[str, Any]) -> Path:
    """Write a document as JSON. Raises DataError where the path cannot be written."""
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None
    return target


def read_document(path: Path) -> dict[str, Any]:
    """Read a JSON document. Raises DataError where there is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def read_run(folder: Path) -> dict[str, Any]:
    """Read a run's ``run.json``. Raises DataError for a folder that is no run."""
    if not (folder / RUN).is_file():
        raise DataError(f"{folder} is no run folder: it holds no {RUN}; make one with: errata bench RECIPE")
    return read_document(folder / RUN)


def row_of(record: Mapping[str, Any]) -> Row:
    """Build a row from its line, numbers that are not finite included."""
    given = {**record, "before": float(record["before"]), "after": float(record["after"])}
    return Row(**given)


@dataclass(frozen=True)
class Line:
    """A line of a journal, read, and where it ends in the file."""

    record: dict[str, Any]
    end: int


class Journal:
    """A file of JSON lines that only grows: what is written was flushed to the disk.

    A last line that a killed process left unfinished is no line; :meth:`cut` takes it away.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[Line]:
        """Yield the whole lines. Raises DataError for one that is not JSON but for the last."""
        if not self.path.exists():
            return
        end, torn = 0, None
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if torn is not None:
                    raise DataError(
                        f"{self.path}, line {torn} is not JSON; remove the file to start its cell again"
                    )
                end += len(line)
                record = _record(line)
                if record is None:
                    torn = number
                    continue
                yield Line(record, end)

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield what the whole lines say."""
        for line in self:
            yield line.record

    def cut(self, end: int) -> None:
        """Keep the first ``end`` bytes only."""
        if self.path.exists():
            with self.path.open("r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())

    def append(self, *records: Mapping[str, Any]) -> None:
        """Write lines at the end and wait until they are on the disk. Raises DataError where that fails."""
        text = "".join(json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records)
        try:
            with self.path.open("ab") as file:
                _whole(file, text.encode())
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error


def _whole(file: BinaryIO, data: bytes) -> None:
    """Append all of some bytes or none, whatever breaks in: a full disk, an interrupt."""
    start = file.seek(0, os.SEEK_END)
    try:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(start)
        raise


def _record(line: bytes) -> dict[str, Any] | None:
    """Read a line; None for one that is not whole."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) else None
