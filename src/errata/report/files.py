"""Write report files atomically."""

from __future__ import annotations

import os
from pathlib import Path

from errata.bench import results
from errata.errors import DataError


def write(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file atomically. Raises DataError where it cannot be written."""
    return results.write_file(path, content)


def folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder if it does not exist. Raises DataError where that fails."""
    target = Path(path)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot create the folder {target}: {error.strerror or error}") from error
    return target
