"""Pictures beside a prompt, and how a prompt says where one is. Loads the standard library only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.errors import RequestError, shown

IMAGE = "<image>"
"""How users write a picture's place in a prompt, or name the picture as the subject."""
_MARK = re.compile(r"<image:([0-9a-f]{16})>")


@dataclass(frozen=True)
class Picture:
    """A picture that a prompt goes with: the bytes of an image file, known by their hash.

    Two are equal if their bytes are, whatever their names.
    """

    sha256: str
    """Hash of the bytes, 64 hex digits."""
    name: str = field(default="", compare=False)
    """The file's name, or what else it is called, for messages."""
    data: bytes | None = field(default=None, compare=False, repr=False)
    """The bytes of the file; None where only its hash is known, as of a request read from an edit."""

    @staticmethod
    def of(data: bytes, name: str = "") -> Picture:
        """Return the picture that an image file's bytes are."""
        return Picture(hashlib.sha256(data).hexdigest(), name, data)

    @property
    def key(self) -> str:
        """The first 16 digits of the hash, which name it in prompts."""
        return self.sha256[:16]

    @property
    def mark(self) -> str:
        """What stands for the picture in a prompt that a host reads."""
        return self.mark_of(self.key)

    @staticmethod
    def mark_of(key: str) -> str:
        """Return what stands in a prompt for the picture with a key."""
        return f"<image:{key}>"

    def to_dict(self) -> dict[str, str]:
        """Return name and hash as plain data; the bytes are kept nowhere else than in the file."""
        return {"sha256": self.sha256, **({"name": self.name} if self.name else {})}

    @staticmethod
    def restore(record: Mapping[str, Any]) -> Picture:
        """Return a picture from its :meth:`to_dict`, without bytes. Raises ValueError for other data."""
        sha256, name = record.get("sha256"), record.get("name", "")
        if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) and isinstance(name, str)):
            raise ValueError("expected the sha256 and the name of a picture")
        return Picture(sha256, name)


def placed_in(text: str, picture: Picture | None, more: Sequence[Picture] = ()) -> str:
    """Return a prompt with the marks of its pictures: where ``<image>`` stands, else before it, in order.

    A prompt that has the marks already stays as it is, and so does one without a picture. Raises RequestError where a
    prompt of several pictures has another number of places for them.
    """
    pictures = () if picture is None else (picture, *more)
    places = text.count(IMAGE)
    if not pictures or (all(one.mark in text for one in pictures) and not (more and places)):
        return text
    if not places:
        return "".join(one.mark for one in pictures) + text
    if not more:
        return text.replace(IMAGE, pictures[0].mark)
    if places != len(pictures):
        raise RequestError(
            f"{shown(text)} has {places} places {IMAGE} for {len(pictures)} pictures: write as many, or none"
        )
    for one in pictures:
        text = text.replace(IMAGE, one.mark, 1)
    return text


def without_mark(text: str, picture: Picture | None, more: Sequence[Picture] = ()) -> str:
    """Return a prompt as users write it, with ``<image>`` for its pictures."""
    for one in () if picture is None else (picture, *more):
        text = text.replace(one.mark, IMAGE)
    return text


def plain_pictures(picture: Picture | None, more: Sequence[Picture] = ()) -> Any:
    """Return name and hash of a prompt's picture as plain data; a list of several, None of none."""
    if picture is None:
        return None
    return [one.to_dict() for one in (picture, *more)] if more else picture.to_dict()


def without_marks(text: str) -> str:
    """Return a text without the marks of any pictures."""
    return _MARK.sub("", text)


def marks(text: str) -> list[tuple[int, int, str]]:
    """List the marks of pictures in a prompt: first and last character, and the picture's key."""
    return [(match.start(), match.end(), match[1]) for match in _MARK.finditer(text)]
