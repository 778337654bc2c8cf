"""A ledger: a folder with the history of a model's edits. Appending is atomic and durable; nothing is ever rewritten.

``.errata/`` holds ``ledger.db`` (SQLite: events, see :mod:`errata.ledger.events`), ``edits/`` (their files, named by
hash) and ``config.yaml`` (model, guard). Neither torch nor transformers are needed to read it.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.exc import DatabaseError

from errata.errors import LedgerError, StateChanged, brief, printable
from errata.ledger import blobs, facts, schema
from errata.ledger.events import FIRST, SHORT, Event, Kind, read
from errata.ledger.schema import EVENTS, FACTS
from errata.ledger.settings import LedgerSettings
from errata.ledger.state import Folding, State, fold

DATABASE, EDITS, CONFIG = "ledger.db", "edits", "config.yaml"
AUTHOR = "ERRATA_AUTHOR"
"""Environment variable that names who makes an edit."""
LONGEST_TEXT = 10_000
"""Most characters of a reason, source or author."""


class Ledger:
    """The history of one model's edits, in a folder. May be used by several threads and processes at once."""

    def __init__(self, folder: Path) -> None:
        """Open an existing ledger; see :mod:`errata.ledger.folders`. Raises LedgerError for a damaged one."""
        self.folder = folder
        if not (folder / DATABASE).is_file():
            raise LedgerError(f"{folder} is no ledger: it has no {DATABASE}; errata init makes one")
        self._database = schema.engine(folder / DATABASE)
        self._lock = threading.RLock()
        self._events: list[Event] = []
        self._folding = Folding()
        with self._readable():
            schema.upgrade(self._database)
        blobs.sweep(self.edits_folder)

    def close(self) -> None:
        """Close the database; the ledger opens it again where it is used."""
        self._database.dispose()

    @property
    def edits_folder(self) -> Path:
        """The folder of the edits' files."""
        return self.folder / EDITS

    @property
    def settings(self) -> LedgerSettings:
        """The ledger's settings, read from its file at every call. Raises ConfigError for wrong ones."""
        return LedgerSettings.read(self.folder / CONFIG)

    def events(self) -> list[Event]:
        """Return all events in order, each checked against its hash and the event before."""
        with self._lock, self._readable(), self._database.connect() as connection:
            self._refresh(connection)
            return list(self._events)

    def state(self) -> State:
        """Return the present state."""
        with self._lock:
            self.events()
            return self._folding.state()

    def active_at(self, name: str) -> tuple[str, ...]:
        """Return the edits in place at a revision, see :meth:`State.find_event`."""
        with self._lock:
            number = self.state().find_event(name)
            return fold(self._events[:number]).active

    def append(
        self, kind: Kind, *, edit: str = "", body: Mapping[str, Any] | None = None, reason: str = "",
        source: str = "", author: str = "", expected: Sequence[str] | None = None,
    ) -> Event:  # fmt: skip
        """Record one event; it is on the disk on return.

        ``expected``: digests of the edits that have to be in place, where what was measured holds for those only.
        Raises StateChanged if others are in place by now, LedgerError where the event cannot follow or be written.
        """
        draft = Event(
            kind, timestamp(), _clean(author) or default_author(), _clean(reason), _clean(source), edit,
            json.loads(json.dumps(body or {}, allow_nan=False)),
        )  # fmt: skip
        with self._lock:
            try:
                with self._readable(), self._writing() as connection:
                    event = self._append(connection, draft, expected)
            except BaseException:
                self._events, self._folding = [], Folding()  # read again at the next use
                raise
            self._events.append(event)
        return event

    def _append(self, connection: sql.Connection, draft: Event, expected: Sequence[str] | None) -> Event:
        """Record an event within a transaction that no other process can write beside."""
        self._refresh(connection)
        if expected is not None and tuple(expected) != tuple(self._folding.active):
            raise StateChanged(
                f"the edits in place are no longer {_list(expected)}: now they are {_list(self._folding.active)}; "
                "look at errata log and try again"
            )
        event = replace(
            draft, previous=self._events[-1].id if self._events else FIRST, number=len(self._events) + 1
        )
        first = event.kind == "proposed" and event.edit not in self._folding.edits
        self._folding.add(event)
        row = {
            "number": event.number, "id": event.id, "previous": event.previous, "kind": event.kind,
            "edit": event.edit, "content": event.content(),
        }  # fmt: skip
        connection.execute(EVENTS.insert().values(row))
        if first and event.body["requests"]:  # an imported edit has none
            keys = [facts.keys(request) for request in event.body["requests"]]
            connection.execute(
                FACTS.insert(),
                [
                    {"edit": event.edit, "request": i, "fact": one.fact, "subject": one.subject}
                    for i, one in enumerate(keys)
                ],
            )
        return event

    def find_facts(self, requests: Sequence[Mapping[str, Any]]) -> dict[int, list[facts.Match]]:
        """Return, by number of a request from 0, the requests of recorded edits about the same subject."""
        found: dict[int, list[facts.Match]] = {}
        with self._readable(), self._database.connect() as connection:
            for number, request in enumerate(requests):
                keys = facts.keys(request)
                rows = connection.execute(sql.select(FACTS).where(FACTS.c.subject == keys.subject)).all()
                if rows:
                    found[number] = [facts.Match(r.edit, r.request, r.fact == keys.fact) for r in rows]
        return found

    def add_file(self, source: Path) -> str:
        """Keep a copy of an edit's file and return its SHA-256; it is on the disk on return."""
        return blobs.add(self.edits_folder, source)

    def file(self, digest: str) -> Path:
        """Return the path of an edit's file, its bytes checked. Raises LedgerError for a missing or changed one."""
        return blobs.check(self.edits_folder, self.state().find_edit(digest).blob)

    def _refresh(self, connection: sql.Connection) -> None:
        """Read the events that were added since the last look; the last known one must still be there."""
        known = len(self._events)
        query = sql.select(EVENTS.c.number, EVENTS.c.id, EVENTS.c.content).order_by(EVENTS.c.number)
        rows = connection.execute(query.where(EVENTS.c.number >= max(1, known))).all()
        if known:
            if not rows or rows[0].id != self._events[-1].id:
                raise LedgerError(f"event {known} of the ledger was changed or removed while it was in use")
            rows = rows[1:]
        for number, identity, content in rows:
            if number != len(self._events) + 1:
                raise LedgerError(
                    f"event {len(self._events) + 1} of the ledger is missing; restore the ledger from a copy"
                )
            event = read(number, identity, self._events[-1].id if self._events else FIRST, content)
            self._folding.add(event)
            self._events.append(event)

    @contextmanager
    def _writing(self) -> Generator[sql.Connection, None, None]:
        """Yield a connection inside a transaction that no other process writes beside."""
        with self._database.connect().execution_options(writes=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def _readable(self) -> Generator[None, None, None]:
        """Turn an error of the database into one that says what to do."""
        try:
            yield
        except DatabaseError as problem:
            cause = brief(str(problem.orig)) if problem.orig is not None else type(problem).__name__
            raise LedgerError(
                f"cannot read or write the ledger {self.folder / DATABASE}: {cause}; nothing was recorded"
            ) from problem


def timestamp() -> str:
    """Return the current time as events have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def default_author() -> str:
    """Return who is using the program: ``ERRATA_AUTHOR``, else user@machine."""
    named = _clean(os.environ.get(AUTHOR, ""))
    if named:
        return named
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"


def _clean(text: str) -> str:
    """Return a text as it is recorded: bounded, without what could control a terminal."""
    if len(text) > LONGEST_TEXT:
        raise LedgerError(
            f"a reason, source or author has {len(text):,} characters, at most {LONGEST_TEXT:,}"
        )
    return printable(text).strip()


def _list(digests: Sequence[str]) -> str:
    return ", ".join(one[:SHORT] for one in digests) or "the base"
