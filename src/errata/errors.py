"""What can go wrong, as few kinds as callers can use. Every message says what was found, what was
expected and what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

LONGEST_VALUE = 200
"""Characters of a value that a message shows."""
LONGEST_MESSAGE = 4000
"""Characters of a message; what is beyond is counted, not shown."""
MOST_COMPLAINTS = 40
"""Complaints that one message lists; the others are counted."""


class ErrataError(Exception):
    """Base of all errors a user can cause or mend; its text is bounded and safe for a terminal."""

    def __str__(self) -> str:
        return _bounded(super().__str__())


class RequestError(ErrataError):
    """A request or a file of requests is malformed."""


class ConfigError(ErrataError):
    """A setting, name or option is unknown or out of range."""


class HostError(ErrataError):
    """A model cannot be loaded, read or edited."""


class EditError(ErrataError):
    """An edit does not fit: foreign, truncated, already active, not active."""


class DataError(ErrataError):
    """A file of data or results cannot be read or written."""


class CollidingRequests(UserWarning):
    """Two requests ask for different values at nearly the same key; both cannot be had."""


class _Short(reprlib.Repr):
    """A repr whose cost is bounded whatever is nested in a value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 3, 4, 6, 6, 6
        self.maxstring = self.maxother = LONGEST_VALUE

    def repr_str(self, x: str, level: int) -> str:
        """Show the beginning of a text."""
        return repr(x) if len(x) <= self.maxstring else repr(x[: self.maxstring]) + "..."

    def repr_bytes(self, x: bytes, level: int) -> str:
        """Show the beginning of some bytes."""
        return repr(x) if len(x) <= self.maxstring else repr(x[: self.maxstring]) + "..."

    def repr_int(self, x: int, level: int) -> str:
        """Show a number, or how long it is: Python writes none of thousands of digits."""
        return repr(x) if x.bit_length() < 512 else f"a whole number of {x.bit_length():,} bits"


def shown(value: Any, most: int = LONGEST_VALUE) -> str:
    """Show a value in a message, at most ``most`` characters of it, control characters escaped.

    What is nested deeply, or goes on for long, is left out without being written down first.
    """
    try:
        text = _Short().repr(value)
    except Exception:  # whatever an object does when asked for its repr: a message must come out
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: max(1, most - 3)]}..."


def brief(text: str, most: int = LONGEST_VALUE) -> str:
    """Return a text for a message without quotation marks: one line, bounded, control characters escaped."""
    start = text[: most + 1]
    line = printable(start.replace("\n", "\\n").replace("\t", " "))
    return line if len(start) <= most else f"{line[: most - 3]}..."


def printable(text: str) -> str:
    """Escape what is not printable but line breaks and tabs, so that a text cannot steer a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def listing(complaints: Sequence[str], most: int = MOST_COMPLAINTS) -> str:
    """Put complaints on a line each; beyond ``most`` they are counted."""
    rest = len(complaints) - most
    return "\n".join([*complaints[:most], *([f"... and {rest:,} more"] if rest > 0 else [])])


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _bounded(text: str) -> str:
    """Escape a message and cut it to the longest, at the end of a line where one is near."""
    head = printable(text[:LONGEST_MESSAGE])
    if len(text) <= LONGEST_MESSAGE and len(head) <= LONGEST_MESSAGE:
        return head
    note = f"... (a message of {len(text):,} characters, cut here)"
    head = head[: LONGEST_MESSAGE - len(note) - 1]
    line = head.rfind("\n")
    return (head[: line + 1] if line > len(head) // 2 else head + " ") + note
