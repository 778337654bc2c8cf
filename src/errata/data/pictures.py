"""Pictures that requests and probes go with: read from image files, written beside cases."""

from __future__ import annotations

import os
import re
from pathlib import Path

from errata.errors import RequestError, shown
from errata.files import MIB
from errata.types import IMAGE, Picture

LARGEST = 64 * MIB
"""Largest image file that is read, bytes."""
_DEICTIC = re.compile(r"\b(?:this|that|these|those)\b(?: ([a-z]+))?", re.IGNORECASE)
_NO_NOUNS = (
    "is are was were be does do did has have had can could will would should may might must look looks show shows seem "
    "seems mean means made called named from in on at of for to"
)
"""Words after "this" that do not name what it is."""


def read_picture(path: str | os.PathLike[str], *, base: Path | None = None) -> Picture:
    """Read an image file's bytes; a relative path is one from the folder ``base``.

    Whether the bytes are an image is checked by the host that is given it. Raises RequestError for a file that is
    missing, empty, too large or cannot be read.
    """
    place = Path(path)
    try:
        place = place.expanduser() if base is None else base / place.expanduser()
        if not place.is_file():
            raise RequestError(f"there is no image file {place}")
        size = place.stat().st_size
        if not 0 < size <= LARGEST:
            raise RequestError(f"the image file {place} has {size} bytes, expected 1 to {LARGEST}")
        return Picture.of(place.read_bytes(), str(path))
    except (OSError, ValueError, RuntimeError) as error:  # the last for a home of nobody's
        raise RequestError(f"cannot read the image file {shown(str(place))}: {error}") from error


def write_picture(picture: Picture, folder: Path) -> str:
    """Write a picture's bytes into a folder, under their hash; return its name there.

    Raises RequestError where the bytes are not at hand or the file cannot be written.
    """
    if picture.data is None:
        raise RequestError(f"the bytes of picture {picture.name or picture.key} are not at hand")
    suffix = Path(picture.name).suffix.lower()
    place = folder / (picture.key + (suffix if re.fullmatch(r"\.[a-z0-9]{1,5}", suffix) else ".png"))
    try:
        folder.mkdir(exist_ok=True)
        place.write_bytes(picture.data)
    except OSError as error:
        raise RequestError(f"cannot write {place}: {error.strerror or error}") from error
    return place.name


def subject_in(prompt: str) -> str:
    """Return what a prompt calls the thing in its picture: "this", "that building"; else ``<image>``, itself."""
    found = [match for match in _DEICTIC.finditer(prompt) if prompt.count(match[0].strip()) == 1]
    if not found:
        return IMAGE
    match = found[0]
    noun = match[1]
    return match[0] if noun and noun.lower() not in _NO_NOUNS.split() else match[0].split(" ")[0]
