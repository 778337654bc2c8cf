"""Find a ledger's folder and make a new one. Needs neither torch nor transformers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errata import files
from errata.errors import LedgerError
from errata.ledger import schema
from errata.ledger.settings import LedgerSettings
from errata.ledger.store import CONFIG, DATABASE, EDITS, Ledger

NAME = ".errata"


def find(place: str | os.PathLike[str] | None = None) -> Ledger:
    """Open the ledger of a folder, default the working folder, or of the nearest folder above that has one.

    ``place`` may be the ``.errata`` folder itself. Raises LedgerError where there is none.
    """
    start = Path(place or ".").expanduser()
    if (start / DATABASE).is_file():
        return Ledger(start)
    for folder in (start.absolute(), *start.absolute().parents):
        if (folder / NAME / DATABASE).is_file():
            return Ledger(folder / NAME)
        if place is not None:
            break  # a folder that was named is meant itself
    raise LedgerError(f"there is no ledger in {start.absolute()}; errata init --model MODEL makes one")


def exists(place: str | os.PathLike[str] | None = None) -> bool:
    """Whether a folder holds a ledger of its own."""
    return (Path(place or ".").expanduser() / NAME / DATABASE).is_file()


def create(
    place: str | os.PathLike[str] | None, settings: LedgerSettings, model: Mapping[str, Any], *, author: str = ""
) -> Ledger:  # fmt: skip
    """Make a ledger in a folder and return it; it appears complete or not at all.

    ``model``: name, fingerprint and hash of the weights, see :func:`errata.ledger.working.describe`. Raises
    LedgerError where there is one already, or the folder cannot be written.
    """
    parent = Path(place or ".").expanduser()
    target = parent / NAME
    if target.exists():
        raise LedgerError(f"{target} exists already; use it, or name another folder with --repo")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f"{NAME}.{os.getpid()}.", dir=parent))
        try:
            (staged / EDITS).mkdir()
            (staged / CONFIG).write_text(settings.text(), encoding="utf-8")
            database = schema.engine(staged / DATABASE)
            schema.upgrade(database)
            database.dispose()
            ledger = Ledger(staged)
            ledger.append("created", body=model, author=author)
            ledger.close()
            staged.chmod(0o777 & ~_mask())
            files.sync(staged)
            staged.rename(target)
            files.sync(parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as problem:
        raise LedgerError(f"cannot make a ledger in {parent}: {problem.strerror or problem}") from problem
    return Ledger(target)


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
