"""Written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from errata.errors import DataError


def write(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file beside its name and move it there. Raises DataError where it cannot be written."""
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        part.write_bytes(data)
        part.replace(target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None
    return target


def folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder where there is none. Raises DataError where that cannot be done."""
    target = Path(path)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {target}: {error.strerror or error}") from error
    return target
