"""Read the records of a file one by one: JSON, JSON lines, CSV, TSV, parquet. Errors name their position.

Lists in JSON are decoded record by record, so that a file larger than memory can be read.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from errata.errors import DataError, brief, shown
from errata.files import HALF_PAIR, LARGEST, MIB, decoder, duplicate

CHUNK = 1 << 20
"""Characters read at a time; more where one record is longer."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
LINES = (".jsonl", ".ndjson")
BYTES_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""How ``surrogateescape`` decodes bytes that are not UTF-8, so that the error can name its row."""
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
NEAR_THE_END = 16
"""A JSON error this many characters before the end of the buffer may be an incomplete token, such as ``nul``."""

Layout = Literal["list", "lines", "document", "table", "parquet", "other"]


class Truncated(DataError):
    """A file cannot be read beyond a position; the records before it were read."""


@dataclass(frozen=True)
class Row:
    """One record of a file and its position; for an unreadable record, the reason."""

    where: str
    """``record 17``, ``line 3`` or ``row 5``, counted from 1."""
    value: Any
    fault: str | None = None


def layout(path: Path) -> Layout:
    """Infer the format of a file from its suffix and first characters. Raises DataError where it cannot be read."""
    suffix = path.suffix.lower()
    if suffix in SEPARATORS:
        return "table"
    if suffix in PARQUET:
        return "parquet"
    with open_text(path) as file:
        start = _first_character(file)
        if not start:
            raise DataError(f"{path} is empty; get the file again")
        if start == "[":
            return "lines" if suffix in LINES and _ends_on_its_line(file) else "list"
        if start == "{":
            return "lines" if suffix in LINES or _ends_on_its_line(file) else "document"
    return "lines" if suffix in LINES else "document" if suffix == ".json" else "other"


def _first_character(file: TextIO) -> str:
    """Return the first character that is not white space; the file position is left before it."""
    while True:
        at = file.tell()
        character = file.read(1)
        if not character or not character.isspace():
            file.seek(at)
            return character


def _ends_on_its_line(file: TextIO) -> bool:
    """Whether a JSON value ends on the line it begins on, and more follows on later lines."""
    try:
        json.loads(file.readline(LARGEST))
    except (ValueError, RecursionError):
        return False
    return _first_character(file) != ""


def rows(path: Path, form: Layout) -> Generator[Row, None, None]:
    """Read the records of a file; a document is one record.

    Raises Truncated where reading cannot continue, DataError where the file cannot be opened or has no known
    format.
    """
    if form == "parquet":
        yield from _parquet(path)
        return
    if form == "other":
        raise DataError(
            f"{path} is of no known format: expected JSON, JSON lines, CSV, TSV or parquet; "
            "for a file in a dataset-specific format, write DATASET@PATH"
        )
    with open_text(path, newline="" if form == "table" else None) as file:
        if form == "list":
            yield from _list(path, file)
        elif form == "lines":
            yield from _lines(path, file)
        elif form == "table":
            yield from _table(path, file)
        else:
            yield Row("record 1", _document(path, file))


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file. Raises DataError where it cannot be opened or read."""
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"cannot read {path}: it is not a regular file")
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _row(where: str, value: Any, raw: str) -> Row:
    fault = "holds bytes that are not UTF-8 text" if BYTES_NOT_UTF8.search(raw) else _fault(value, raw)
    return Row(where, None if fault else value, fault)


def _fault(value: Any, raw: str) -> str | None:
    """Return why a decoded record is unusable (a duplicate field, half a surrogate pair); None if it is usable."""
    try:
        twice = duplicate(value)
    except RecursionError:
        return "nested too deeply"
    if twice:
        return f"names the field {shown(twice[0], 60)} twice"
    halves = _ESCAPED.search(raw) is not None and HALF_PAIR.search(json.dumps(value, ensure_ascii=False))
    return "holds half a surrogate pair, which is no character" if halves else None


class _Window:
    """A sliding buffer over a file that is being decoded."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path = path
        self.file = file
        self.text = ""
        self.at = 0
        self.lines = 0  # line ends before the text
        self.column = 0  # characters between the last of them and the text

    def more(self) -> bool:
        """Read at least as many characters again as the buffer has; False at the end of the file."""
        text = self.file.read(max(CHUNK, len(self.text) - self.at))
        if not text:
            return False
        line, column = self.place(self.at)
        self.lines, self.column = line - 1, column - 1
        self.text, self.at = self.text[self.at :] + text, 0
        return True

    def place(self, at: int) -> tuple[int, int]:
        """Return line and column, counted from 1, of a position in the buffer."""
        ends = self.text.count("\n", 0, at)
        since = at - self.text.rfind("\n", 0, at) - 1 if ends else self.column + at
        return self.lines + ends + 1, since + 1

    def peek(self) -> str:
        """Skip white space and return the next character; empty at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self, number: int) -> tuple[Any, str]:
        """Decode the next value; return it with its source text. Raises Truncated."""
        parser = decoder()
        while True:
            try:
                value, end = parser.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not (_may_go_on(error, self.text) and self.more()):
                    raise self._broken(number, error.msg, error.pos) from error
                continue
            except RecursionError as error:
                raise self._broken(number, "nested too deeply", self.at) from error
            if end == len(self.text) and self.more():
                continue  # a number may go on in what follows
            raw, self.at = self.text[self.at : end], end
            return value, raw

    def _broken(self, number: int, why: str, at: int) -> Truncated:
        """Return the error for a position beyond which the file cannot be read."""
        line, column = self.place(min(at, len(self.text)))
        return Truncated(
            f"{self.path} breaks off in record {number} (line {line}, column {column}): {why}; "
            f"{number - 1} records before it can be read; get the file again, or repair it there"
        )


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the error may be due to the end of the buffer, not of the file."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - NEAR_THE_END


def _list(path: Path, file: TextIO) -> Iterator[Row]:
    """Decode a JSON list value by value."""
    window = _Window(path, file)
    window.peek()
    window.at += 1  # the bracket that made this a list
    number = 1
    if window.peek() == "]":
        return
    while True:
        window.peek()
        value, raw = window.value(number)
        yield _row(f"record {number}", value, raw)
        number += 1
        mark = window.peek()
        if mark not in (",", "]"):
            raise window._broken(number, "expected a comma or the end of the list", window.at)
        window.at += 1
        if mark == "]":
            break
    if window.peek():
        raise window._broken(number, "text after the end of the list", window.at)


def _lines(path: Path, file: TextIO) -> Iterator[Row]:
    """Decode one value per line. An unreadable last line without line end means that the file is truncated."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            yield _row(where, decoder().decode(line), line)
        except (json.JSONDecodeError, RecursionError) as error:
            why = (
                f"not JSON: {error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else "nested too deeply"
            )
            if not line.endswith("\n"):
                raise Truncated(
                    f"{path} breaks off in {where}, which has no line end: {why}; the lines before it can be "
                    "read; get the file again, or repair it there"
                ) from error
            yield Row(where, None, why)


def _document(path: Path, file: TextIO) -> Any:
    text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise Truncated(f"{path} is one document of more than {LARGEST // MIB} MiB; write it as JSON lines")
    spoilt = BYTES_NOT_UTF8.search(text)
    if spoilt:
        line = text.count("\n", 0, spoilt.start()) + 1
        raise Truncated(f"{path}, line {line} holds bytes that are not UTF-8 text; repair it there")
    try:
        value = decoder().decode(text)
        fault = _fault(value, text)
        if fault is not None:
            raise Truncated(f"{path} {fault}; repair it there")
        return value
    except RecursionError as error:
        raise Truncated(f"{path} is nested too deeply to be read") from error
    except json.JSONDecodeError as error:
        raise Truncated(
            f"{path} is not JSON: {error.msg} (line {error.lineno}, column {error.colno}); "
            "get the file again, or repair it there"
        ) from error


def _table(path: Path, file: TextIO) -> Iterator[Row]:
    """Read a table whose first line has the column names; empty cells are absent fields."""
    reader = csv.DictReader(file, delimiter=SEPARATORS[path.suffix.lower()], strict=True)
    try:
        names = reader.fieldnames or []
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(
                f"{path} has several columns of one name: {brief(', '.join(twice))}; name each once"
            )
        for cells in reader:
            where = f"line {reader.line_num}"
            surplus = cells.pop(None, None)  # type: ignore[call-overload]
            if surplus:
                yield Row(where, None, f"{len(surplus)} cells more than the first line has names")
                continue
            missing = sum(cell is None for cell in cells.values())
            if missing:
                yield Row(where, None, f"{missing} cells fewer than the first line has names")
                continue
            value = {name: cell for name, cell in cells.items() if cell != ""}
            yield _row(where, value, "".join(value.values()))
    except csv.Error as error:
        raise Truncated(
            f"{path} breaks off after line {reader.line_num}: {error}; repair it there"
        ) from error


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'errata[datasets]'") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"row {number}", value)
    except (OSError, ArrowException) as error:
        raise Truncated(f"{path} cannot be read as parquet after row {number}: {error}") from error
