"""The events of a ledger: what happened to a model, by whom, when and why. Each names the one before it by its hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from errata.errors import LedgerError, shown

Kind = Literal[
    "created", "proposed", "verified", "applied", "reverted", "reset", "tagged", "exported", "merged"
]
KINDS: frozenset[str] = frozenset(get_args(Kind))
FIRST = "0" * 64
"""What the first event of a ledger names as the event before it."""
SHORT = 12
"""Hex digits of an event's or edit's id in a table."""


@dataclass(frozen=True)
class Event:
    """One event; its id is the SHA-256 of all its other fields but the number."""

    kind: Kind
    created: str
    """When, UTC, ISO 8601 to the second."""
    author: str
    reason: str = ""
    source: str = ""
    """Where the new fact is from: a URL or a document; empty where none was given."""
    edit: str = ""
    """Digest of the edit it is about; empty where it is about none, or several."""
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What else belongs to an event of this kind, as plain data."""
    previous: str = FIRST
    """Id of the event before it."""
    number: int = 0
    """Place in the ledger, from 1."""

    def content(self) -> str:
        """Return all that the id covers as JSON in ASCII: the same text for the same event on every machine."""
        fields = {
            "kind": self.kind, "created": self.created, "author": self.author, "reason": self.reason,
            "source": self.source, "edit": self.edit, "body": self.body, "previous": self.previous,
        }  # fmt: skip
        return json.dumps(fields, sort_keys=True, ensure_ascii=True, separators=(",", ":"), allow_nan=False)

    @property
    def id(self) -> str:
        """Identity of the event, 64 hex digits."""
        return hashlib.sha256(self.content().encode("ascii")).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the event as plain data."""
        return {"number": self.number, "id": self.id, **json.loads(self.content())}


def read(number: int, identity: str, previous: str, content: str) -> Event:
    """Return a stored event. Raises LedgerError unless content and id belong together and follow ``previous``."""
    where = f"event {number} of the ledger"
    if hashlib.sha256(content.encode("utf-8", "backslashreplace")).hexdigest() != identity:
        raise LedgerError(
            f"{where} was changed after it was recorded: its content does not match its hash {identity[:SHORT]}; "
            "restore the ledger from a copy"
        )
    fields = json.loads(content)
    if fields["previous"] != previous:
        raise LedgerError(
            f"{where} follows {fields['previous'][:SHORT]}, expected {previous[:SHORT]}: an event before it was "
            "removed or changed; restore the ledger from a copy"
        )
    if fields["kind"] not in KINDS:
        raise LedgerError(
            f"{where} is of kind {shown(fields['kind'])}, which a newer errata may know; update it"
        )
    return Event(**fields, number=number)
