"""The files of a ledger's edits, named by the SHA-256 of their bytes; each is on the disk before an event names it."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from errata import files
from errata.errors import LedgerError

NAME = re.compile("[0-9a-f]{64}")
SUFFIX = ".safetensors"
STAGED = ".part"
"""Ending of a file that is being written; a killed process may leave one."""


def add(folder: Path, source: Path) -> str:
    """Copy a file into the folder and return its name; nothing is written where it is there already.

    The copy and its folder entry are on the disk on return. Raises LedgerError where it cannot be written.
    """
    try:
        data = source.read_bytes()
        name = hashlib.sha256(data).hexdigest()
        target = path(folder, name)
        if not target.is_file():
            _write(folder, target, data)
        return name
    except OSError as problem:
        raise LedgerError(f"cannot keep an edit in {folder}: {problem.strerror or problem}") from problem


def path(folder: Path, name: str) -> Path:
    """Return the path of a file. Raises LedgerError for a name that is no SHA-256, so that none leads elsewhere."""
    if not NAME.fullmatch(name):
        raise LedgerError(f"the ledger names an edit's file {name[:80]!r}, which is no SHA-256")
    return folder / f"{name}{SUFFIX}"


def check(folder: Path, name: str) -> Path:
    """Return the path of a file whose bytes match its name. Raises LedgerError for a missing or changed one."""
    source = path(folder, name)
    try:
        found = files.sha256(source)
    except FileNotFoundError:
        raise LedgerError(f"{source} is missing; restore it from a copy of the ledger") from None
    except OSError as problem:
        raise LedgerError(f"cannot read {source}: {problem.strerror or problem}") from problem
    if found != name:
        raise LedgerError(f"{source} was changed after it was recorded; restore it from a copy of the ledger")
    return source


def sweep(folder: Path) -> int:
    """Remove files that killed processes left half-written; return their number."""
    removed = 0
    for part in folder.glob(f"*{STAGED}"):
        owner = part.name.split(".")[0]
        if owner.isdecimal() and not files.abandoned(part, int(owner)):
            continue
        with suppress(OSError):
            part.unlink()
            removed += 1
    return removed


def _write(folder: Path, target: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f"{os.getpid()}.", suffix=STAGED, dir=folder)
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.chmod(files.mode())  # mkstemp's own mode keeps a server under another user out
        part.replace(target)
        files.sync(folder)
    finally:
        part.unlink(missing_ok=True)
