"""How a method looks in figures: a colour and a marker that its name alone decides, so they are always the same."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

COLOURS = 12
"""Colours that a theme has for methods."""
MARKERS = ("o", "s", "^", "D", "v", "P")
SALT = 8127
"""Chosen so that the methods known at the time share a colour with one other at most."""


class Style(NamedTuple):
    """Places in a theme's colours and in :data:`MARKERS`."""

    colour: int
    marker: int


def style_of(name: str) -> Style:
    """Return a method's style; two methods of one colour nearly always differ in their marker."""
    digest = hashlib.sha256(f"{SALT}:{name}".encode("utf-8", "replace")).digest()
    number = int.from_bytes(digest[:4], "big")
    return Style(number % COLOURS, number // COLOURS % len(MARKERS))
