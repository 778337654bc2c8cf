"""The state of a ledger: what its events, taken in order, leave in place."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from errata.errors import LedgerError, shown
from errata.ledger.events import FIRST, SHORT, Event

BASE, NOW = "base", "now"
"""Names of the state without edits and of the present one."""
TAG = re.compile("[A-Za-z][A-Za-z0-9._/-]{0,99}")
SHORTEST = 4
"""Hex digits of an id that a user has to give at least."""


@dataclass(frozen=True)
class Recorded:
    """An edit of a ledger, as its events describe it."""

    digest: str
    facts: Mapping[str, Any]
    """Body of its ``proposed`` event: method, config, seed, kind, requests, blob, versions, what was in place."""
    event: Event
    """Its ``proposed`` event."""
    verified: Event | None = None
    """Its latest ``verified`` event."""
    applied: int | None = None
    """Number of the event that applied it first."""
    replaces: tuple[str, ...] = ()
    """Edits whose place it took when it was applied, as it includes them."""

    @property
    def requests(self) -> list[dict[str, Any]]:
        """Its requests as plain data."""
        return list(self.facts["requests"])

    @property
    def blob(self) -> str:
        """SHA-256 of its file."""
        return self.facts["blob"]

    @property
    def short(self) -> str:
        """The beginning of its digest, as tables show it."""
        return self.digest[:SHORT]


@dataclass(frozen=True)
class State:
    """What is in place after some events."""

    edits: Mapping[str, Recorded]
    """All edits ever proposed, by digest."""
    active: tuple[str, ...]
    """Digests of the edits in place, in the order in which they are applied."""
    tags: Mapping[str, int]
    """By name, the number of the event that it points to."""
    tagged: Mapping[str, str]
    """By name of a tag, the edit that was the last one in place there; empty without edits."""
    ids: tuple[str, ...]
    """Ids of the events, in order."""
    model: Mapping[str, Any]
    """Body of the ``created`` event: model, fingerprint, hash of the weights, versions."""

    @property
    def head(self) -> str:
        """Id of the latest event."""
        return self.ids[-1] if self.ids else FIRST

    @property
    def revision(self) -> str:
        """Name of what is in place, 16 hex digits; :data:`BASE` without edits."""
        return revision(self.active)

    def find_edit(self, name: str) -> Recorded:
        """Return an edit by the first digits of its digest, or by a tag: the last edit in place there.

        Raises LedgerError if there is none, or several begin so.
        """
        if self.tagged.get(name):
            return self.edits[self.tagged[name]]
        return self.edits[_find(name, list(self.edits), "edit", "errata log")]

    def find_event(self, name: str) -> int:
        """Return the number of the event that a revision ends with: after it, the revision is in place.

        ``name``: ``base`` (0), ``now``, a tag, an event by number or first digits of its id, or an edit, which means
        the event that applied it first. Raises LedgerError for anything else.
        """
        if name in (BASE, NOW):
            return 0 if name == BASE else len(self.ids)
        if name in self.tags:
            return self.tags[name]
        if name.isdecimal() and 1 <= int(name[:9]) <= len(self.ids) and len(name) < 9:
            return int(name)
        what = "revision (base, now, a tag, an edit or an event)"
        match = _find(name, [*self.edits, *self.ids], what, "errata log")
        if match not in self.edits:
            return self.ids.index(match) + 1
        number = self.edits[match].applied
        if number is None:
            raise LedgerError(
                f"edit {match[:SHORT]} was never in place; name a tag, an event or another edit"
            )
        return number


def fold(events: Iterable[Event]) -> State:
    """Return the state after some events, the first ones of a ledger. Raises LedgerError for what cannot follow."""
    folding = Folding()
    for event in events:
        folding.add(event)
    return folding.state()


def check_tag(name: str) -> None:
    """Raise LedgerError for what cannot be the name of a tag."""
    reserved = name.lower() in (BASE, NOW) or re.fullmatch(f"[0-9a-fA-F]{{{SHORTEST},}}", name)
    if not TAG.fullmatch(name) or reserved or ".." in name:
        raise LedgerError(
            f"a tag cannot be called {shown(name)}: expected a letter, then letters, digits and . _ - / (not ..); not "
            f"{BASE} or {NOW}, and nothing that an id could begin with"
        )


def revision(active: Sequence[str]) -> str:
    """Return the name of some edits in place in this order."""
    return hashlib.sha256("\n".join(active).encode()).hexdigest()[:16] if active else BASE


def _find(name: str, candidates: Sequence[str], what: str, see: str) -> str:
    text = name.lower()
    if len(text) < SHORTEST:
        raise LedgerError(f"the ledger has no {what} {shown(name)}; an id needs {SHORTEST} digits at least")
    found = [one for one in candidates if one.startswith(text)]
    if not found:
        raise LedgerError(f"the ledger has no {what} {shown(name)}; see {see}")
    if len(found) > 1:
        some = ", ".join(one[:SHORT] for one in found[:4])
        raise LedgerError(f"{shown(name)} begins {len(found)} ids: {some}; give more digits")
    return found[0]


@dataclass
class Folding:
    """A state while events are added to it."""

    edits: dict[str, Recorded] = field(default_factory=dict[str, Recorded])
    active: list[str] = field(default_factory=list[str])
    tags: dict[str, int] = field(default_factory=dict[str, int])
    tagged: dict[str, str] = field(default_factory=dict[str, str])
    ids: list[str] = field(default_factory=list[str])
    model: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def add(self, event: Event) -> None:
        """Add the next event. Raises LedgerError, with nothing changed, for one that cannot follow."""
        _STEPS[event.kind](self, event)
        self.ids.append(event.id)

    def state(self) -> State:
        """Return the state so far."""
        return State(
            dict(self.edits),
            tuple(self.active),
            dict(self.tags),
            dict(self.tagged),
            tuple(self.ids),
            self.model,
        )

    def known(self, event: Event, digest: str) -> Recorded:
        """Return an edit that an event names."""
        if digest not in self.edits:
            raise self.wrong(event, f"names edit {shown(digest[:SHORT])}, which was never proposed")
        return self.edits[digest]

    def wrong(self, event: Event, what: str) -> LedgerError:
        """Return an error about an event."""
        return LedgerError(f"event {event.number} of the ledger {what}; restore the ledger from a copy")


def _created(state: Folding, event: Event) -> None:
    if state.ids:
        raise state.wrong(event, "creates it a second time")
    state.model = event.body


def _proposed(state: Folding, event: Event) -> None:
    # an edit may be proposed again, say after its guard refused it: what it is stays the same
    earlier = state.edits.get(event.edit)
    state.edits[event.edit] = (
        Recorded(event.edit, event.body, event) if earlier is None else replace(earlier, event=event)
    )


def _verified(state: Folding, event: Event) -> None:
    state.edits[event.edit] = replace(state.known(event, event.edit), verified=event)


def _applied(state: Folding, event: Event) -> None:
    one = state.known(event, event.edit)
    replaces = tuple(event.body.get("replaces", ()))
    if one.digest in state.active:
        raise state.wrong(event, f"applies edit {one.short}, which is in place already")
    if not set(replaces) <= set(state.active):
        raise state.wrong(event, f"has edit {one.short} take the place of one that is not in place")
    place = min((state.active.index(digest) for digest in replaces), default=len(state.active))
    kept = [digest for digest in state.active if digest not in replaces]
    state.active = [*kept[:place], one.digest, *kept[place:]]
    number = event.number if one.applied is None else one.applied
    state.edits[one.digest] = replace(one, replaces=replaces, applied=number)


def _reverted(state: Folding, event: Event) -> None:
    one = state.known(event, event.edit)
    if one.digest not in state.active:
        raise state.wrong(event, f"reverts edit {one.short}, which is not in place")
    restores = [state.known(event, digest).digest for digest in event.body.get("restores", ())]
    place = state.active.index(one.digest)
    state.active[place : place + 1] = restores


def _reset(state: Folding, event: Event) -> None:
    state.active = [state.known(event, digest).digest for digest in event.body["active"]]


def _tagged(state: Folding, event: Event) -> None:
    state.tags[event.body["name"]] = event.body["number"]
    state.tagged[event.body["name"]] = event.body.get("edit", "")


def _noted(state: Folding, event: Event) -> None:
    """Leave the state as it is."""


_STEPS: Mapping[str, Callable[[Folding, Event], None]] = {
    "created": _created, "proposed": _proposed, "verified": _verified, "applied": _applied, "reverted": _reverted,
    "reset": _reset, "tagged": _tagged, "exported": _noted, "merged": _noted,
}  # fmt: skip
