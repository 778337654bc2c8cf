"""Files at the border: sizes bounded before parsing, one kind of error for whatever a parser trips over,
and outputs written whole or not at all. Standard library only; PyYAML is loaded where YAML is read."""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errata.errors import DataError, ErrataError, brief

MIB = 1 << 20
LARGEST = 512 * MIB
"""Bytes of a file that is held in memory whole while it is read."""
LARGEST_YAML = 8 * MIB
"""The same of a YAML file: its parser takes about a second per megabyte."""
MOST_NODES = 1_000_000
"""Values that a YAML document may come to once its aliases are written out."""
DEEPEST = 200
"""Levels of nesting that are read."""
MOST_DIGITS = 4300
"""Digits of a number, Python's own limit."""

Fail = Callable[[str], ErrataError]

MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
"""Byte order marks and what they announce; those of 32 bits first, as one begins like one of 16."""


# --- reading --------------------------------------------------------------------------------


def read_bytes(path: Path, error: type[ErrataError], *, most: int = LARGEST, what: str = "") -> bytes:
    """Read a regular file of a bounded size.

    ``what``: what the file is called in messages. Raises ``error`` for anything else than such a file.
    """
    name = f"{what} {path}".strip()
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
            raise error(f"cannot read {name}: it is {kind}")
        if status.st_size > most:
            raise error(
                f"{name} has {status.st_size / MIB:,.0f} MiB, at most {most / MIB:,.0f} MiB are read; split it"
                + (", or write it as JSON lines" if path.suffix.lower() in (".yaml", ".yml") else "")
            )
        with path.open("rb") as file:
            return file.read(most)
    except (OSError, ValueError) as problem:  # ValueError: a null character in the name
        raise error(f"cannot read {name}: {getattr(problem, 'strerror', None) or problem}") from problem


def read_text(path: Path, error: type[ErrataError], *, most: int = LARGEST, what: str = "") -> str:
    """Read a text file: UTF-8, or what its byte order mark says. Raises ``error`` naming the line at fault."""
    return decode(read_bytes(path, error, most=most, what=what), f"{what} {path}".strip(), error)


def decode(data: bytes, name: str, error: type[ErrataError]) -> str:
    """Decode a text by its byte order mark, else as UTF-8. Raises ``error`` naming the line at fault."""
    encoding = next((word for mark, word in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        kind = "UTF-8" if encoding.startswith("utf-8") else encoding.upper()
        raise error(
            f"{name}, line {line}: {problem.object[problem.start : problem.start + 8]!r} is not {kind} text; "
            "save the file as UTF-8"
        ) from problem
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise error(
            f"{name}, line {line}: a null character; expected text. Where the file is UTF-16 without a byte order "
            "mark, save it as UTF-8"
        )
    return text


class Duplicates(dict):
    """A JSON object that has a name more than once, with the last value of each as usual."""

    names: tuple[str, ...] = ()


class LongNumber:
    """Stands for a number of more digits than Python reads."""

    def __init__(self, digits: int) -> None:
        self.digits = digits

    def __repr__(self) -> str:
        return f"a number of {self.digits:,} digits"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) == len(pairs):
        return mapping
    names = [name for name, _ in pairs]
    twice = Duplicates(mapping)
    twice.names = tuple(dict.fromkeys(name for name in names if names.count(name) > 1))
    return twice


def _whole(digits: str) -> Any:
    return int(digits) if len(digits) <= MOST_DIGITS else LongNumber(len(digits.lstrip("-")))


def decoder() -> json.JSONDecoder:
    """Return a decoder of JSON that marks objects with a name twice, see :class:`Duplicates`."""
    return json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole)


def parse_json(text: str, fail: Fail) -> Any:
    """Parse a JSON document. Raises what ``fail`` makes of the reason, its cause kept.

    Objects that name a field twice are refused, and so are values nested deeper than :data:`DEEPEST`.
    """
    with reader(fail):
        try:
            value = decoder().decode(text)
        except json.JSONDecodeError as problem:
            raise fail(
                f"not JSON: {problem.msg} at line {problem.lineno}, column {problem.colno}"
            ) from problem
        twice = duplicate(value)
        if twice:
            raise fail(f"the field {brief(twice[0])!r} stands twice in one object; leave one out")
        return value


def duplicate(value: Any, depth: int = 0) -> tuple[str, ...]:
    """Return the names that stand twice in some object of a parsed value; empty where none does.

    Raises RecursionError beyond :data:`DEEPEST` levels.
    """
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(value, dict):
        if isinstance(value, Duplicates):
            return value.names
        inner: Any = value.values()
    elif isinstance(value, list):
        inner = value
    else:
        return ()
    for item in inner:
        if isinstance(item, (dict, list)) and (twice := duplicate(item, depth + 1)):
            return twice
    return ()


@contextmanager
def reader(fail: Fail) -> Iterator[None]:
    """Turn whatever a parser raises inside the block into what ``fail`` makes of the reason, cause kept."""
    try:
        yield
    except ErrataError:
        raise
    except RecursionError as problem:
        raise fail("nested too deeply to be read") from problem
    except MemoryError as problem:
        raise fail("too large for this machine's memory; split it") from problem
    except Exception as problem:  # the one door: a parser may trip over anything in a strange file
        raise fail(f"cannot be read: {brief(str(problem)) or type(problem).__name__}") from problem


def parse_yaml(text: str, fail: Fail, *, written: bool = False) -> Any:
    """Parse one YAML document. Raises what ``fail`` makes of the reason, its cause kept.

    ``written``: leave numbers, dates and words such as ``no`` as the texts they are written as; only true, false
    and null are values. Fields named twice are refused, aliases that come to more than :data:`MOST_NODES`
    values too.
    """
    return parse_yaml_lines(text, fail, written=written)[0]


def parse_yaml_lines(text: str, fail: Fail, *, written: bool = False) -> tuple[Any, list[int]]:
    """Parse a YAML document as :func:`parse_yaml` does; return with it the lines on which its items begin."""
    from errata._yaml import load

    if len(text) > LARGEST_YAML:
        raise fail(f"{len(text) / MIB:,.0f} MiB of YAML, at most {LARGEST_YAML / MIB:,.0f} are read")
    with reader(fail):
        return load(text, fail, written=written)


# --- writing --------------------------------------------------------------------------------


def output(path: str | os.PathLike[str], error: type[ErrataError] = DataError) -> Path:
    """Return where a file is to be written: behind a link, what it points to.

    Raises ``error`` now where writing would fail, or would take the place of what is no regular file, as a
    device or a pipe.
    """
    target = Path(path).expanduser()
    try:
        if target.is_symlink():
            target = target.resolve()
        mode = target.stat().st_mode if target.exists() else None
    except (OSError, RuntimeError, ValueError) as problem:  # RuntimeError: a link to itself
        reason = (
            getattr(problem, "strerror", None) or "its name is no possible one, or it is a link to itself"
        )
        raise error(f"cannot write {path}: {reason}") from problem
    if mode is not None and stat.S_ISDIR(mode):
        raise error(f"cannot write {path}: it is a folder; name a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise error(f"cannot write {path}: it is no regular file but a device, pipe or socket; name a file")
    if not target.parent.is_dir():
        raise error(f"cannot write {path}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise error(f"cannot write {path}: no permission in {target.parent}")
    return target


@contextmanager
def replacing(path: str | os.PathLike[str], error: type[ErrataError] = DataError) -> Iterator[Path]:
    """Give a file to write beside a target; it takes the target's place when the block ends well.

    Whatever happens before that leaves the old file as it was and nothing beside it. Raises ``error`` where
    the target cannot be written.
    """
    target = output(path, error)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        yield part
        if target.exists():
            part.chmod(stat.S_IMODE(target.stat().st_mode))
        part.replace(target)
    except OSError as problem:
        raise error(f"cannot write {path}: {problem.strerror or problem}") from problem
    finally:
        part.unlink(missing_ok=True)


def write(path: str | os.PathLike[str], content: str | bytes, error: type[ErrataError] = DataError) -> Path:
    """Write a file whole or not at all; return the path that was given. Raises ``error``."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with replacing(path, error) as part:
        part.write_bytes(data)
    return Path(path)
