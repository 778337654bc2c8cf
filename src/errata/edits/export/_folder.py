"""The folder of an export: written beside its place, synchronised to the disk, then put there in one step.

A process that is killed leaves the earlier export as it was, and a staged folder that the next export to the same
place removes. What the folder holds is named in its record, with checksums.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError

from errata import files
from errata.errors import EditError

RECORD = "errata-export.json"
"""Names the files of an export, with their checksums and the edit they were made of."""
PART, OLD = "part", "old"
"""Endings of a folder that is being written, and of an earlier export that gives way."""


def check_folder(folder: str | os.PathLike[str], *, force: bool) -> Path:
    """Return the folder to write; a link's target. What killed exports left beside it is removed.

    Raises EditError where it cannot be written, or holds anything: with ``force`` anything but an earlier export.
    """
    target = Path(folder).expanduser()
    try:
        target = target.resolve() if target.is_symlink() else target
        sweep(target.absolute())
        present = _entries(target) if target.is_dir() else set[str]()
    except (OSError, RuntimeError, ValueError) as problem:
        raise EditError(
            f"cannot write {folder}: {getattr(problem, 'strerror', None) or problem}"
        ) from problem
    if target.exists() and not target.is_dir():
        raise EditError(f"cannot write {folder}: it is a file; name a folder")
    if not target.absolute().parent.is_dir():
        raise EditError(f"cannot write {folder}: the folder {target.parent} does not exist")
    if not os.access(target.absolute().parent, os.W_OK):
        raise EditError(f"cannot write {folder}: no permission in {target.parent}")
    if present and not force:
        raise EditError(f"{folder} exists; name another folder, or replace an earlier export with --force")
    foreign = sorted(present - _recorded(target)) if present else []
    if foreign:
        raise EditError(f"{folder} holds {foreign[0]!r:.80}, which no export wrote; name another folder")
    return target


def sweep(target: Path) -> None:
    """Remove what killed exports to a place left beside it; an earlier export that gave way is put back."""
    if not target.parent.is_dir():
        return
    name = re.compile(rf"{re.escape(target.name)}\.(\d+)(?:\.\d+)?\.({PART}|{OLD})")
    for path in target.parent.iterdir():
        match = name.fullmatch(path.name)
        if match is None or not files.abandoned(path, int(match[1])):
            continue
        if match[2] == OLD and not target.exists():
            path.rename(target)
        else:
            shutil.rmtree(path, ignore_errors=True)


def write(
    target: Path, record: Mapping[str, Any], fill: Callable[[Path], None], check: Callable[[Path], Mapping[str, Any]]
) -> tuple[tuple[str, ...], Mapping[str, Any]]:  # fmt: skip
    """Write a folder and put it in the place of ``target``; return the names of its files, and what ``check`` returned.

    ``fill`` writes the files into an empty folder, ``check`` reads them there and returns what the record is to say of
    that. Raises EditError, with nothing changed, where the folder cannot be written, and whatever ``check`` raises.
    """
    turn = f"{os.getpid()}.{time.monotonic_ns()}"
    part, old = (target.with_name(f"{target.name}.{turn}.{ending}") for ending in (PART, OLD))
    try:
        part.mkdir()
        fill(part)
        checked = dict(check(part))
        names = tuple(sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file()))
        whole = {**record, **checked, "files": {name: files.sha256(part / name) for name in names}}
        text = json.dumps(whole, indent=2, ensure_ascii=False, sort_keys=True)
        (part / RECORD).write_text(f"{text}\n", encoding="utf-8")
        files.settle(part)
        _replace(part, target, old)
        files.sync(target.parent)
    except (OSError, SafetensorError) as problem:  # as where the disk is full
        raise EditError(
            f"cannot write {target}: {getattr(problem, 'strerror', None) or problem}"
        ) from problem
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return (*names, RECORD), checked


def _replace(part: Path, target: Path, old: Path) -> None:
    """Put a folder in the place of another, in one step where the system offers that; the other is at ``old`` then."""
    if not target.exists():
        part.rename(target)
    elif _exchange(part, target):
        part.rename(old)
    else:
        target.rename(old)
        part.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or its file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _entries(folder: Path) -> set[str]:
    """Return the names of all that a folder holds, of inner folders with a path."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def _recorded(folder: Path) -> set[str]:
    """Return the names of the files and folders that an earlier export wrote into a folder, its record's too."""
    path = folder / RECORD
    if not path.is_file():
        return set()
    written = {RECORD, *read_record(folder)[1]}
    inside = {parent.as_posix() for name in written for parent in Path(name).parents}
    return written | inside


def read_record(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return an export's record, and the checksums of its files by name. Raises EditError for a damaged one."""
    path = folder / RECORD
    record: Any = files.parse_json(
        files.read_text(path, EditError), lambda reason: EditError(f"{path} is damaged: {reason}")
    )
    entries = cast("dict[str, Any]", record) if isinstance(record, dict) else {}
    names: Any = entries.get("files")
    if not isinstance(names, dict):
        raise EditError(f"{path} is damaged: it names no files")
    return entries, {str(name): str(value) for name, value in cast("dict[str, Any]", names).items()}
