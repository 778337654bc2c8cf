"""Written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from errata.bench import results
from errata.errors import DataError


def write(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file beside its name and move it there. Raises DataError where it cannot be written."""
    return results.write_file(path, content)


def folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder where there is none. Raises DataError where that cannot be done."""
    target = Path(path)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {target}: {error.strerror or error}") from error
    return target
