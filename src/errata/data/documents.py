"""Records of JSON, JSON lines and YAML files, each with the line it begins on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from errata.data.tables import Unreadable
from errata.files import HALF_PAIR, Duplicates, decoder, parse_yaml_lines
from errata.limits import DEEPEST, Fail

Records = list[tuple[str, Any]]

_SPACE = re.compile(r"[ \t\r\n]*")


def json_records(text: str, fail: Fail) -> Records:
    """Read records written one per line, as a list, or one after the other over several lines.

    Lines that are not JSON become :class:`Unreadable`; raises ``fail(reason)`` where the text has none of the three
    forms.
    """
    first = next((line for line in text.split("\n") if line.strip()), "")
    if not first:
        return []
    if isinstance(_line(first), dict):
        return _lines(text)
    try:
        values = list(_list_values(text) if text.lstrip()[:1] == "[" else _concatenated(text))
    except json.JSONDecodeError as problem:
        lines = _lines(text)
        if any(isinstance(value, dict) for _, value in lines):
            return lines
        raise fail(f"not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}") from problem
    numbers, line, at = [], 1, 0
    for begin, _ in values:
        line, at = line + text.count("\n", at, begin), begin
        numbers.append(line)
    return _with_positions([value for _, value in values], numbers)


def yaml_records(text: str, fail: Fail) -> Records:
    """Read the records of a YAML list, or a single record; values except true, false and null are kept as text."""
    loaded, lines = parse_yaml_lines(text, fail, as_text=True)
    items = loaded if isinstance(loaded, list) else [] if loaded is None else [loaded]
    return _with_positions(items, lines)


def _with_positions(values: list[Any], lines: list[int]) -> Records:
    pairs = enumerate(zip(values, lines, strict=True), 1)
    return [(f"record {i} (line {line})", value) for i, (value, line) in pairs]


def fault(value: Any, depth: int = 0) -> str | None:
    """Return why a parsed record is unusable: a duplicate field, half a surrogate pair, depth; None if it is usable."""
    if depth > DEEPEST:
        return "nested too deeply to be read"
    if isinstance(value, str):
        half = HALF_PAIR.search(value)
        return f"holds half a surrogate pair, \\u{ord(half[0]):04x}, which is no character" if half else None
    if isinstance(value, Duplicates):
        return f"the field {value.names[0]!r:.60} is there twice; remove one"
    parts = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((why for part in parts if (why := fault(part, depth + 1)) is not None), None)


def _line(line: str) -> Any:
    """Parse one line; return :class:`Unreadable` where it is not JSON."""
    try:
        return decoder().decode(line)
    except json.JSONDecodeError as problem:
        return Unreadable(f"not JSON: {problem.msg}")
    except RecursionError:
        return Unreadable("nested too deeply to be read")


def _lines(text: str) -> Records:
    # splitlines also cuts at U+2028, which is legal within JSON
    return [(f"line {i}", _line(line)) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _list_values(text: str) -> Iterator[tuple[int, Any]]:
    """Yield the values of a list with where each begins. Raises JSONDecodeError."""
    parser = decoder()
    at = _after(text, text.index("[") + 1)
    closed = text[at : at + 1] == "]"
    while not closed:
        value, end = parser.raw_decode(text, at)
        yield at, value
        at = _after(text, end)
        closed = text[at : at + 1] == "]"
        if not closed:
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            at = _after(text, at + 1)
    at = _after(text, at + 1)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _concatenated(text: str) -> Iterator[tuple[int, Any]]:
    """Yield position and value of concatenated JSON values. Raises JSONDecodeError."""
    parser, at = decoder(), _after(text, 0)
    while at < len(text):
        if at and text[at] != "{" and text[:at].strip():
            raise json.JSONDecodeError("Extra data", text, at)
        value, end = parser.raw_decode(text, at)
        yield at, value
        at = _after(text, end)


def _after(text: str, at: int) -> int:
    """Return the position after white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at
