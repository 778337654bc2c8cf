"""Read tables of requests written by hand or by spreadsheets: separators, headers, quotes, blank rows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from errata.errors import brief, shown
from errata.limits import Fail

SEPARATORS = ",;\t|"
WORDS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
HEAD = 1 << 16
"""The header must be within this many characters."""
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?$', re.IGNORECASE)
_NAMELESS = re.compile(r"(unnamed: \d+)?", re.IGNORECASE)
_COUNT = re.compile(r"\s*\d*\s*")


class Unreadable(str):
    """The error for an unreadable row or line; it takes the place of its record."""


def records(
    text: str, expected_names: Sequence[str], fail: Fail, row: Callable[[dict[str, str]], bool]
) -> Iterator[tuple[str, Any]]:
    """Yield the non-blank rows of a table with the lines they begin on.

    The separator is the one that gives the header most of the ``known`` names, ignoring case. ``row``: whether
    cells form a complete row, to detect unclosed quotes. Raises ``fail(reason)`` where header or quotes are wrong.
    """
    rows = _rows(text, expected_names, fail)
    start, header = next(rows, (0, []))
    names = _names(header, expected_names, fail, start)
    nameless = [i for i, name in enumerate(names) if _NAMELESS.fullmatch(name)]
    for line, cells in rows:
        if not any(cell.strip() for cell in cells):
            continue
        spare = [cells[i] for i in nameless if i < len(cells) and not _COUNT.fullmatch(cells[i])]
        if spare:
            raise fail(
                f"line {line}: column {nameless[0] + 1} has no name in line {start} and has {shown(spare[0], 60)}; "
                "name it, or remove it"
            )
        if any(cell.strip() for cell in cells[len(names) :]):
            yield (
                f"line {line}",
                Unreadable(
                    f"{len(cells)} cells, the header has {len(names)} names; quote texts that contain the separator"
                ),
            )
            continue
        values = {
            name: cell.replace("\r\n", "\n")
            for i, (name, cell) in enumerate(zip(names, cells, strict=False))
            if i not in nameless
        }
        swallowed = _swallowed(cells, names, row)
        if swallowed is not None:
            raise fail(
                f"line {line}: a quote that opens here closes only after the row {shown(swallowed, 80)}; close "
                "it before the end of its line, or double it where it is part of the text"
            )
        yield f"line {line}", values


def _rows(text: str, expected_names: Sequence[str], fail: Fail) -> Iterator[tuple[int, list[str]]]:
    """Yield rows with the lines they begin on, header first; a line ``sep=;`` before it sets the separator."""
    lines = text[:HEAD].splitlines()
    first_line = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    declaration = _SEPARATOR_LINE.match(lines[first_line].strip()) if first_line < len(lines) else None
    head = (
        lines[first_line + (declaration is not None)]
        if first_line + (declaration is not None) < len(lines)
        else ""
    )
    separator = declaration[1] if declaration else _separator(head, expected_names)
    spaced = re.search(rf"{re.escape(separator)} +\S", head) is not None and separator != " "
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=spaced
    )
    pending = declaration is not None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as problem:
            raise fail(f"line {start}: {_reason(problem)}") from problem
        if not any(cell.strip() for cell in cells) and start <= first_line:
            continue
        if pending:
            pending = False
            continue
        yield start, cells


def _separator(head: str, expected_names: Sequence[str]) -> str:
    """Choose the separator that gives a header most of the known names."""
    names = {name.casefold() for name in expected_names}

    def known_columns(separator: str) -> int:
        return sum(cell.strip().strip('"').casefold() in names for cell in head.split(separator))

    return max(SEPARATORS, key=known_columns)


def _names(header: Sequence[str], expected_names: Sequence[str], fail: Fail, line: int) -> list[str]:
    """Return the column names, stripped and in their known spelling. Raises for a duplicate name."""
    plain = {name.casefold(): name for name in expected_names}
    names = [cell.strip().strip("\ufeff") for cell in header]
    names = [name if name in expected_names else plain.get(name.casefold(), name) for name in names]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise fail(f"line {line}: several columns are named {brief(', '.join(twice))}; name each once")
    return names


def _swallowed(
    cells: Sequence[str], names: Sequence[str], row: Callable[[dict[str, str]], bool]
) -> str | None:
    """Return a line inside a cell that is itself a row, which means that a quote was left open."""
    for cell in cells:
        for line in cell.splitlines()[1:] if "\n" in cell or "\r" in cell else ():
            for separator in SEPARATORS:
                parts = line.split(separator)
                if len(parts) >= len(names) and row(
                    {n: p.strip('"') for n, p in zip(names, parts, strict=False)}
                ):
                    return line
    return None


def _reason(problem: csv.Error) -> str:
    text = str(problem)
    if "unexpected end" in text:
        return "a quote that opens here is never closed"
    if "expected after" in text:
        return "text follows a closing quote; double a quote within a quoted cell"
    if "field larger" in text:
        return "a cell has more than 131,072 characters; write such texts as JSON lines"
    return text
