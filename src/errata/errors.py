"""The exceptions of errata, and helpers for their messages. Every message says what was found, what was
expected and what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

LONGEST_VALUE = 200
"""Maximum characters of a value in a message."""
LONGEST_MESSAGE = 4000
"""Maximum characters of a message; the rest is counted, not shown."""
MOST_COMPLAINTS = 40
"""Maximum number of problems that a message lists; the others are counted."""


class ErrataError(Exception):
    """Base of all errors that a user can cause or fix; its text is limited in length and safe for a terminal."""

    def __str__(self) -> str:
        return _bounded(super().__str__())


class RequestError(ErrataError):
    """A request or a file of requests is malformed."""


class ConfigError(ErrataError):
    """A setting, name or option is unknown or out of range."""


class HostError(ErrataError):
    """A model cannot be loaded, read or edited."""


class EditError(ErrataError):
    """An edit cannot be used: it is for another model, damaged, already in place, or not in place."""


class DataError(ErrataError):
    """A file of data or results cannot be read or written."""


class LedgerError(ErrataError):
    """A ledger is missing or damaged, or has nothing of that name."""


class StateChanged(LedgerError):
    """Another process changed which edits are in place while this one was working on the earlier ones."""


class ConflictError(LedgerError):
    """A request contradicts or repeats one of an edit that is in place."""


class CollidingRequests(UserWarning):
    """Two requests need different values at nearly the same key; both cannot be satisfied."""


class _Short(reprlib.Repr):
    """A repr of bounded cost for deeply nested or long values."""

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
        """Show a number, or its length if it is very long: Python refuses to convert thousands of digits."""
        return repr(x) if x.bit_length() < 512 else f"a whole number of {x.bit_length():,} bits"


def shown(value: Any, most: int = LONGEST_VALUE) -> str:
    """Format a value for a message in at most ``most`` characters, with control characters escaped.

    Deeply nested or long parts are skipped without formatting them first.
    """
    try:
        text = _Short().repr(value)
    except Exception:  # an object's repr may raise anything, but the message must still be shown
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[: max(1, most - 3)]}..."


def brief(text: str, most: int = LONGEST_VALUE) -> str:
    """Return a text for a message without quotation marks: one line, bounded, control characters escaped."""
    start = text[: most + 1]
    line = printable(start.replace("\n", "\\n").replace("\t", " "))
    return line if len(start) <= most else f"{line[: most - 3]}..."


def printable(text: str) -> str:
    """Escape all unprintable characters except line breaks and tabs, so that a text cannot control a terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else _escape(c) for c in text)


def listing(complaints: Sequence[str], most: int = MOST_COMPLAINTS) -> str:
    """Format problems, one per line; those beyond ``most`` are counted."""
    rest = len(complaints) - most
    return "\n".join([*complaints[:most], *([f"... and {rest:,} more"] if rest > 0 else [])])


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _bounded(text: str) -> str:
    """Escape a message and truncate it to the maximum length, at a line end if one is near."""
    head = printable(text[:LONGEST_MESSAGE])
    if len(text) <= LONGEST_MESSAGE and len(head) <= LONGEST_MESSAGE:
        return head
    note = f"... (a message of {len(text):,} characters, cut here)"
    head = head[: LONGEST_MESSAGE - len(note) - 1]
    line = head.rfind("\n")
    return (head[: line + 1] if line > len(head) // 2 else head + " ") + note
