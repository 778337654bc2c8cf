"""Which names of models the server answers to, and the edits that each stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from errata.edits import Edit
from errata.errors import ErrataError, shown
from errata.ledger.events import SHORT
from errata.ledger.settings import LEAST, MOST
from errata.ledger.state import SHORTEST, State, revision
from errata.ledger.store import Ledger

ALL = "all"
PLUS = "+"


class UnknownModel(ErrataError):
    """There is no model, or no edit, of that name."""


@dataclass(frozen=True)
class Entry:
    """What is told about an edit."""

    digest: str
    method: str
    kind: str
    requests: tuple[Mapping[str, Any], ...]
    applied: bool
    """Whether it is in place in the ledger, or was given on the command line."""
    created: str = ""
    author: str = ""
    reason: str = ""
    source: str = ""
    measured: Mapping[str, Any] | None = None
    """What its guard measured last: body of the ``verified`` event; None where nothing was."""

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain data, its id first."""
        return {
            "id": self.digest, "object": "edit", "method": self.method, "kind": self.kind, "applied": self.applied,
            "requests": [dict(one) for one in self.requests], "created": self.created, "author": self.author,
            "reason": self.reason, "source": self.source,
            "measured": None if self.measured is None else dict(self.measured),
            "report": guard_report(self.measured or {}),
        }  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """What a request is answered with."""

    model: str
    """The name that was asked for."""
    edits: tuple[str, ...]
    """Digests of the edits that act."""

    @property
    def revision(self) -> str:
        """Name of these edits together: ``base``, or that of a ledger that has exactly these in place."""
        return revision(self.edits)


@dataclass(frozen=True)
class Catalogue:
    """Names and edits at one moment. Never changed: another one takes its place."""

    base: str
    """Name of the model without edits."""
    entries: Mapping[str, Entry] = field(default_factory=dict[str, Entry])
    """Edits by digest, in the order in which they were made."""
    active: tuple[str, ...] = ()
    """Digests of the edits in place, in their order."""
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """By name of a tag, the edits that were in place there."""
    events: int = 0
    """Events of the ledger."""

    @staticmethod
    def of_files(base: str, edits: Sequence[Edit]) -> Catalogue:
        """Return the catalogue of edits that were read from files."""
        entries: dict[str, Entry] = {}
        for one in edits:
            requests = tuple(request.to_dict() for request in one.provenance.requests)
            entries[one.digest] = Entry(
                one.digest, one.provenance.method, one.kind, requests, True, one.provenance.created
            )
        return Catalogue(base, entries, tuple(entries))

    @staticmethod
    def of_ledger(base: str, ledger: Ledger) -> Catalogue:
        """Return the catalogue of a ledger as it is now."""
        state = ledger.state()
        tags = {name: ledger.active_at(name) for name in state.tags}
        return Catalogue(base, _entries(state), state.active, tags, len(state.ids))

    @property
    def revision(self) -> str:
        """Name of what is in place."""
        return revision(self.active)

    def models(self) -> dict[str, tuple[str, ...]]:
        """Return the edits of every name: base, all that is in place, each edit alone, each tag."""
        names = {self.base: (), f"{self.base}{PLUS}{ALL}": self.active}
        names |= {f"{self.base}{PLUS}{digest[:SHORT]}": (digest,) for digest in self.entries}
        for tag, edits in self.tags.items():
            names.setdefault(f"{self.base}{PLUS}{tag}", edits)
        return names

    def choose(self, model: str, edits: Sequence[str] | None = None) -> Choice:
        """Return what a name, and further edits by id or tag, stand for. Raises UnknownModel for an unknown one."""
        name = model.removeprefix(self.base)
        if not model.startswith(self.base) or (name and not name.startswith(PLUS)):
            raise UnknownModel(f"there is no model {shown(model, 80)}; GET /v1/models lists them")
        digests = list(self.find(name.removeprefix(PLUS))) if name else []
        for one in edits or ():
            digests += [digest for digest in self.find(one) if digest not in digests]
        return Choice(model, tuple(digests))

    def find(self, name: str) -> tuple[str, ...]:
        """Return the edits that ``all``, a tag or the first digits of an id stand for. Raises UnknownModel."""
        if name == ALL:
            return self.active
        if name in self.tags:
            return self.tags[name]
        text = name.lower()
        found = (
            [digest for digest in self.entries if digest.startswith(text)] if len(text) >= SHORTEST else []
        )
        if len(found) != 1:
            problem = f"{len(found)} edits begin with" if found else "there is no edit or tag"
            raise UnknownModel(f"{problem} {shown(name, 80)}; GET /v1/edits lists them")
        return (found[0],)

    def entry(self, name: str) -> Entry:
        """Return one edit by the first digits of its id. Raises UnknownModel for anything else."""
        found = self.find(name) if name != ALL and name not in self.tags else ()
        if len(found) != 1:
            raise UnknownModel(f"{shown(name, 80)} is no edit's id; GET /v1/edits lists them")
        return self.entries[found[0]]


def guard_report(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a guard measured as lines to read: what, value, bound, and whether it was kept.

    ``body``: a verdict as plain data, with ``measured`` and ``bounds``.
    """
    measured, bounds = body.get("measured", {}), body.get("bounds", {})
    lines: list[dict[str, Any]] = []
    for names, word in ((LEAST, "at least"), (MOST, "at most")):
        for name, what in names.items():
            value = measured.get(name)
            if value is None:
                continue
            bound = bounds[name]
            number = isinstance(value, (int, float))  # what is not finite is recorded as text
            passed = number and (value >= bound if names is LEAST else value <= bound)
            shown_value = f"{value:.4g}" if number else str(value)
            lines.append(
                {"what": what, "value": shown_value, "word": word, "bound": f"{bound:.4g}", "passed": passed}
            )
    return lines


def _entries(state: State) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for digest, one in state.edits.items():
        measured = None if one.verified is None else one.verified.body
        entries[digest] = Entry(
            digest, one.facts["method"], one.facts["kind"], tuple(one.requests), digest in state.active,
            one.event.created, one.event.author, one.event.reason, one.event.source, measured,
        )  # fmt: skip
    return entries
