"""Read and write files safely: sizes are limited before parsing, any parser failure becomes one kind of error,
and outputs are written atomically. Standard library only; PyYAML is loaded where YAML is read, psutil where
leftovers of killed processes are looked for."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errata.errors import DataError, ErrataError, brief
from errata.limits import DEEPEST, MOST_DIGITS, Fail

MIB = 1 << 20
HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which is no character: text with one cannot be encoded."""
LARGEST = 512 * MIB
"""Maximum size in bytes of a file that is read into memory."""
LARGEST_YAML = 8 * MIB
"""The same for a YAML file: its parser takes about a second per megabyte."""
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
"""Byte order marks and their encodings; UTF-32 first, as the UTF-16 mark is a prefix of one of them."""


# --- reading --------------------------------------------------------------------------------


def read_bytes(path: Path, error: type[ErrataError], *, most: int = LARGEST, what: str = "") -> bytes:
    """Read a regular file of at most ``most`` bytes.

    ``what``: a description of the file for messages. Raises ``error`` for a larger file, or anything but a regular
    file.
    """
    name = f"{what} {path}".strip()
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
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
    """Read a text file: UTF-8, or as its byte order mark says. Raises ``error`` with the offending line."""
    return decode(read_bytes(path, error, most=most, what=what), f"{what} {path}".strip(), error)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, 64 hex digits. Raises OSError where it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MIB):
            digest.update(block)
    return digest.hexdigest()


def decode(data: bytes, name: str, error: type[ErrataError]) -> str:
    """Decode a text by its byte order mark, else as UTF-8. Raises ``error`` with the offending line."""
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
            f"{name}, line {line}: a null character; expected text. If the file is UTF-16 without a byte order mark, "
            "save it as UTF-8"
        )
    return text


class Duplicates(dict):
    """A JSON object with duplicate names; as usual, the last value of each is kept."""

    names: tuple[str, ...] = ()


class LongNumber:
    """Takes the place of a number with more digits than Python parses."""

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
    """Return a JSON decoder that marks objects with duplicate names, see :class:`Duplicates`."""
    return json.JSONDecoder(object_pairs_hook=_object, parse_int=_whole)


def parse_json(text: str, fail: Fail) -> Any:
    """Parse a JSON document. Raises ``fail(reason)`` with the original exception as its cause.

    Objects with duplicate names are refused, and so are values nested deeper than :data:`errata.limits.DEEPEST`.
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
            raise fail(f"the field {brief(twice[0])!r} is there twice in one object; remove one")
        return value


def duplicate(value: Any, depth: int = 0) -> tuple[str, ...]:
    """Return the duplicate names of an object in a parsed value; empty where there are none.

    Raises RecursionError beyond :data:`errata.limits.DEEPEST` levels.
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
    """Convert any exception of a parser inside the block to ``fail(reason)``, with the original as its cause."""
    try:
        yield
    except ErrataError:
        raise
    except RecursionError as problem:
        raise fail("nested too deeply to be read") from problem
    except MemoryError as problem:
        raise fail("too large for this machine's memory; split it") from problem
    except Exception as problem:  # parsers may raise anything on a malformed file
        raise fail(f"cannot be read: {brief(str(problem)) or type(problem).__name__}") from problem


def parse_yaml(text: str, fail: Fail, *, as_text: bool = False) -> Any:
    """Parse one YAML document. Raises ``fail(reason)`` with the original exception as its cause.

    ``as_text``: keep numbers, dates and words such as ``no`` as text; only true, false and null are converted.
    Duplicate fields are refused, and so are aliases that expand to more than :data:`errata.limits.MOST_NODES` values.
    """
    return parse_yaml_lines(text, fail, as_text=as_text)[0]


def parse_yaml_lines(text: str, fail: Fail, *, as_text: bool = False) -> tuple[Any, list[int]]:
    """Parse a YAML document like :func:`parse_yaml`; also return the lines on which its items begin."""
    from errata._yaml import load

    if len(text) > LARGEST_YAML:
        raise fail(f"{len(text) / MIB:,.0f} MiB of YAML, at most {LARGEST_YAML / MIB:,.0f} are read")
    with reader(fail):
        return load(text, fail, as_text=as_text)


# --- writing --------------------------------------------------------------------------------


def output(path: str | os.PathLike[str], error: type[ErrataError] = DataError) -> Path:
    """Return the path to write to; for a symbolic link, its target.

    Raises ``error`` where writing would fail, or would replace something other than a regular file, such as a
    device or a pipe.
    """
    target = Path(path).expanduser()
    try:
        if target.is_symlink():
            target = target.resolve()
        mode = target.stat().st_mode if target.exists() else None
    except (OSError, RuntimeError, ValueError) as problem:  # RuntimeError: a link to itself
        reason = getattr(problem, "strerror", None) or "its name is invalid, or it is a link to itself"
        raise error(f"cannot write {path}: {reason}") from problem
    if mode is not None and stat.S_ISDIR(mode):
        raise error(f"cannot write {path}: it is a folder; name a file")
    if mode is not None and not stat.S_ISREG(mode):
        raise error(
            f"cannot write {path}: it is not a regular file but a device, pipe or socket; name a file"
        )
    if not target.parent.is_dir():
        raise error(f"cannot write {path}: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK):
        raise error(f"cannot write {path}: no permission in {target.parent}")
    return target


@contextmanager
def replacing(path: str | os.PathLike[str], error: type[ErrataError] = DataError) -> Iterator[Path]:
    """Yield a temporary file next to the target; it replaces the target when the block ends without an exception.

    Otherwise the old file stays as it was and the temporary file is removed. Raises ``error`` where the target
    cannot be written.
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
    """Write a file atomically; return ``path``. Raises ``error``."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
    with replacing(path, error) as part:
        part.write_bytes(data)
    return Path(path)


# --- lasting writes -------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's entries, on the disk; where the system offers no way, do nothing."""
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        if path.is_dir():  # Windows opens no folders
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mode(*, executable: bool = False) -> int:
    """Return the mode that a new file has by the process's mask; of a program or a folder with ``executable``."""
    mask = os.umask(0)
    os.umask(mask)
    return (0o777 if executable else 0o666) & ~mask


def settle(folder: Path) -> None:
    """Give all files and folders below one the modes that the process's mask allows, and have them on the disk.

    Some writers make files that only their owner can read, which a server under another user cannot open.
    """
    inner = sorted(folder.rglob("*"), reverse=True)  # what a folder holds before the folder
    for path in (*inner, folder):
        path.chmod(mode(executable=path.is_dir() or path.suffix == ".sh"))
        sync(path)


def abandoned(path: Path, process: int) -> bool:
    """Whether the process that made a file or folder is gone: none has its number, or one that began later."""
    import psutil

    try:
        status = path.stat()
        # renaming moves the second one alone
        return max(status.st_mtime, status.st_ctime) < psutil.Process(process).create_time() - 1
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, OSError):  # a process that tells nothing, or a file that is gone meanwhile
        return False
