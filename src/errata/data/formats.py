"""Read the records of a file one by one: JSON, JSON lines, CSV, TSV, parquet. Faults keep their position.

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
from errata.files import LARGEST, MIB, decoder, duplicate

CHUNK = 1 << 20
"""Characters read at a time; more where one record is longer."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
LINES = (".jsonl", ".ndjson")
BYTES_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What ``surrogateescape`` makes of bytes that are no UTF-8, so that the fault can be laid at its row."""
_ESCAPED, _HALF = re.compile(r"\\u[dD][89a-fA-F]"), re.compile("[\ud800-\udfff]")
NEAR_THE_END = 16
"""Characters before the end of what was read within which a fault may be an unfinished word, as ``nul``."""

Layout = Literal["list", "lines", "document", "table", "parquet", "other"]


class Truncated(DataError):
    """A file cannot be read beyond a place; the records before it were."""


@dataclass(frozen=True)
class Row:
    """One record of a file and where it stands; of a record that cannot be read, what is wrong."""

    where: str
    """``record 17``, ``line 3`` or ``row 5``, counted from 1."""
    value: Any
    fault: str | None = None


def layout(path: Path) -> Layout:
    """Tell how a file is built, from its suffix and beginning. Raises DataError where that cannot be read."""
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
    """Return the first character that is not white space, and leave the file before it."""
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

    Raises BrokenOff at the place beyond which nothing can be read, DataError where the file cannot be opened
    or is of no known format.
    """
    if form == "parquet":
        yield from _parquet(path)
        return
    if form == "other":
        raise DataError(
            f"{path} is of no known format: expected JSON, JSON lines, CSV, TSV or parquet; "
            "a file in a format of its dataset's own is named DATASET@PATH"
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
    """Open a text file. Raises DataError saying why it cannot be opened or read."""
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"cannot read {path}: it is no regular file")
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _row(where: str, value: Any, raw: str) -> Row:
    fault = "holds bytes that are not UTF-8 text" if BYTES_NOT_UTF8.search(raw) else _fault(value, raw)
    return Row(where, None if fault else value, fault)


def _fault(value: Any, raw: str) -> str | None:
    """Say what makes a decoded record unfit, names given twice or half a surrogate pair; None where nothing does."""
    try:
        twice = duplicate(value)
    except RecursionError:
        return "nested too deeply"
    if twice:
        return f"names the field {shown(twice[0], 60)} twice"
    halves = _ESCAPED.search(raw) is not None and _HALF.search(json.dumps(value, ensure_ascii=False))
    return "holds half a surrogate pair, which is no character" if halves else None


class _Window:
    """The part of a file that is being decoded: what is done with goes, what is needed is read on."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self.path = path
        self.file = file
        self.text = ""
        self.at = 0
        self.lines = 0  # line ends before the text
        self.column = 0  # characters between the last of them and the text

    def more(self) -> bool:
        """Read on, at least as much as is held; False at the end of the file."""
        text = self.file.read(max(CHUNK, len(self.text) - self.at))
        if not text:
            return False
        line, column = self.place(self.at)
        self.lines, self.column = line - 1, column - 1
        self.text, self.at = self.text[self.at :] + text, 0
        return True

    def place(self, at: int) -> tuple[int, int]:
        """Return line and column, counted from 1, of a place in the text."""
        ends = self.text.count("\n", 0, at)
        since = at - self.text.rfind("\n", 0, at) - 1 if ends else self.column + at
        return self.lines + ends + 1, since + 1

    def peek(self) -> str:
        """Step over white space and return the next character; empty at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self, number: int) -> tuple[Any, str]:
        """Decode the next value; return it with its text. Raises BrokenOff."""
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
        """Word the complaint about the place beyond which the file cannot be read."""
        line, column = self.place(min(at, len(self.text)))
        return Truncated(
            f"{self.path} breaks off in record {number} (line {line}, column {column}): {why}; "
            f"{number - 1} records before it can be read; get the file again, or mend it there"
        )


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether a fault may be due to the end of what was read so far."""
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
    """Decode one value a line. A last line without line end that cannot be read means a file cut short."""
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
                    "read; get the file again, or mend it there"
                ) from error
            yield Row(where, None, why)


def _document(path: Path, file: TextIO) -> Any:
    text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise Truncated(f"{path} is one document of more than {LARGEST // MIB} MiB; write it as JSON lines")
    spoilt = BYTES_NOT_UTF8.search(text)
    if spoilt:
        line = text.count("\n", 0, spoilt.start()) + 1
        raise Truncated(f"{path}, line {line} holds bytes that are not UTF-8 text; mend it there")
    try:
        value = decoder().decode(text)
        fault = _fault(value, text)
        if fault is not None:
            raise Truncated(f"{path} {fault}; mend it there")
        return value
    except RecursionError as error:
        raise Truncated(f"{path} is nested too deeply to be read") from error
    except json.JSONDecodeError as error:
        raise Truncated(
            f"{path} is not JSON: {error.msg} (line {error.lineno}, column {error.colno}); "
            "get the file again, or mend it there"
        ) from error


def _table(path: Path, file: TextIO) -> Iterator[Row]:
    """Read records by the names of a first line; empty cells are absent fields."""
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
        raise Truncated(f"{path} breaks off after line {reader.line_num}: {error}; mend it there") from error


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
