"""The job table of a run: which cell is open, who works on it and until when, and how it ended.

One SQLite file. A cell is taken with a lease; who works on it renews the lease from a thread of its own,
so a worker that died or hangs loses it after :data:`LEASE` seconds and another one takes the cell over.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errata.bench import machine
from errata.bench.results import JOB_STATES, job_seal
from errata.errors import DataError, shown

State = Literal["open", "leased", "done", "refused", "failed"]
OVER: tuple[State, ...] = ("done", "refused", "failed")

LEASE = 60.0
"""Seconds that a cell is held without a sign of life."""
MOST_ATTEMPTS = 3
"""How often a cell is taken before it counts as failed: something in it kills who works on it."""

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    cell TEXT PRIMARY KEY, place INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'open',
    owner TEXT, lease_until REAL, attempts INTEGER NOT NULL DEFAULT 0, reason TEXT,
    seal TEXT
)"""


class LeaseLost(DataError):
    """Another worker has taken the cell over: this one was silent for too long."""


@dataclass(frozen=True)
class Job:
    """One line of the table."""

    cell: str
    state: State
    owner: str | None
    lease_until: float | None
    attempts: int
    reason: str | None


def new_owner() -> str:
    """Return a worker's name, from which others can tell whether it is running: machine, process, a random part."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


class Jobs:
    """The table in a file; each call is a transaction of its own, so any process and thread may ask."""

    def __init__(
        self,
        path: Path,
        *,
        lease: float = LEASE,
        shared: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``shared``: the file lies in a folder that several machines see, where a write-ahead log, which
        lives in one machine's memory, must not be used."""
        self.path, self.lease, self.clock = path, lease, clock
        self.shared = shared

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=60, isolation_level=None)) as table:
                table.execute("BEGIN IMMEDIATE")
                try:
                    yield table
                except BaseException:
                    table.execute("ROLLBACK")
                    raise
                table.execute("COMMIT")
        except sqlite3.Error as error:
            raise DataError(f"the job table {self.path} cannot be used: {error}") from error

    def create(self, cells: Iterable[str]) -> None:
        """Make the table, with every cell that it does not have yet open."""
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as table:
                table.execute(f"PRAGMA journal_mode={'DELETE' if self.shared else 'WAL'}")
        except sqlite3.Error as error:
            raise DataError(f"the job table {self.path} cannot be made: {error}") from error
        with self._open() as table:
            table.execute(_TABLE)
            if "seal" not in [line[1] for line in table.execute("PRAGMA table_info(jobs)")]:  # an older one
                table.execute("ALTER TABLE jobs ADD COLUMN seal TEXT")
            table.executemany(
                "INSERT OR IGNORE INTO jobs (cell, place) VALUES (?, ?)",
                [(cell, place) for place, cell in enumerate(cells)],
            )

    def all(self) -> list[Job]:
        """Return every line in the order of the plan."""
        with self._open() as table:
            rows = table.execute(
                "SELECT cell, state, owner, lease_until, attempts, reason FROM jobs ORDER BY place"
            ).fetchall()
        damaged_rows = [line for line in rows if line[1] not in JOB_STATES]
        if damaged_rows:
            raise DataError(
                f"the job table {self.path} is damaged: cell {shown(damaged_rows[0][0])} has state "
                f"{shown(damaged_rows[0][1])}; remove the file and continue with --resume"
            )
        return [Job(*line) for line in rows]

    def take(self, owner: str, cells: Sequence[str]) -> str | None:
        """Lease the first of some cells that is open or whose lease has run out; None where there is none.

        A cell that was taken too often and never ended is set to failed instead.
        """
        now, names = self.clock(), set(cells)
        with self._open() as table:
            free = table.execute(
                "SELECT cell, attempts FROM jobs WHERE state = 'open' OR (state = 'leased' AND lease_until < ?)"
                " ORDER BY place",
                (now,),
            ).fetchall()
            for cell, attempts in free:
                if cell not in names:
                    continue
                if attempts >= MOST_ATTEMPTS:
                    self._end(
                        table, cell, "failed", f"given up: {attempts} workers ended while they worked on it"
                    )
                    continue
                table.execute(
                    "UPDATE jobs SET state = 'leased', owner = ?, lease_until = ?, attempts = attempts + 1"
                    " WHERE cell = ?",
                    (owner, now + self.lease, cell),
                )
                return cell
        return None

    def renew(self, cell: str, owner: str) -> bool:
        """Hold a cell for another lease; False where it is no longer the owner's."""
        with self._open() as table:
            update = table.execute(
                "UPDATE jobs SET lease_until = ? WHERE cell = ? AND owner = ? AND state = 'leased'",
                (self.clock() + self.lease, cell, owner),
            )
            return update.rowcount == 1

    def end(self, cell: str, owner: str, state: State, reason: str | None = None) -> None:
        """Set how a cell ended. Raises LeaseLost where it is no longer the owner's."""
        with self._open() as table:
            row = table.execute("SELECT owner, state FROM jobs WHERE cell = ?", (cell,)).fetchone()
            if row != (owner, "leased"):
                raise LeaseLost(f"cell {cell} was taken over by {row and row[0]} in the meantime")
            self._end(table, cell, state, reason)

    def _end(self, table: sqlite3.Connection, cell: str, state: State, reason: str | None) -> None:
        table.execute(
            "UPDATE jobs SET state = ?, reason = ?, seal = ?, owner = NULL, lease_until = NULL WHERE cell = ?",
            (state, reason, job_seal(cell, state, reason), cell),
        )

    def reopen(self, states: Sequence[State], cells: Sequence[str]) -> None:
        """Open some cells again that ended in one of some states; how often they were taken is forgotten."""
        self._reopen([job.cell for job in self.all() if job.state in states and job.cell in set(cells)])

    def release(self, cell: str, owner: str | None) -> None:
        """Return a leased cell to the open ones, if it is still leased by this owner; the attempt counts."""
        with self._open() as table:
            table.execute(
                "UPDATE jobs SET state = 'open', owner = NULL, lease_until = NULL WHERE cell = ? AND owner = ?",
                (cell, owner),
            )

    def release_dead(self) -> None:
        """Release cells leased by workers of this machine that no longer run."""
        for job in self.all():
            if job.state == "leased" and not _is_running(job.owner):
                self.release(job.cell, job.owner)

    def _reopen(self, cells: Sequence[str]) -> None:
        with self._open() as table:
            table.executemany(
                "UPDATE jobs SET state = 'open', owner = NULL, lease_until = NULL, attempts = 0, reason = NULL,"
                " seal = NULL"
                " WHERE cell = ?",
                [(cell,) for cell in cells],
            )

    def forget_attempts(self) -> None:
        """Reset the counts of attempts: the user has started the run again."""
        with self._open() as table:
            table.execute("UPDATE jobs SET attempts = 0 WHERE state IN ('open', 'leased')")


def _is_running(owner: str | None) -> bool:
    """Whether a worker may be running; of one on another machine only its lease can tell."""
    name, _, process = (owner or "").rpartition(":")[0].partition(":")
    if name != socket.gethostname() or not process.isdecimal():
        return bool(owner)
    return machine.is_running(int(process))


class Lease:
    """Holds a cell while the block runs, by renewing its lease three times as often as needed."""

    def __init__(self, jobs: Jobs, cell: str, owner: str) -> None:
        self.jobs, self.cell, self.owner = jobs, cell, owner
        self._over = threading.Event()
        self._renewed_at = jobs.clock()
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._beat, name=f"lease of {cell}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        """Raise LeaseLost where the cell is no longer this worker's; to be asked before anything is written.

        A worker that slept through its lease, as in a suspended machine, asks the table before its heart does.
        """
        if self._problem is None and self.jobs.clock() - self._renewed_at > self.jobs.lease:
            self._renew()
        if self._problem is not None:
            raise LeaseLost(self._problem)

    def _beat(self) -> None:
        while self._problem is None and not self._over.wait(self.jobs.lease / 3):
            self._renew()

    def _renew(self) -> None:
        now = self.jobs.clock()
        try:
            if not self.jobs.renew(self.cell, self.owner):
                self._problem = f"cell {self.cell} was taken over meanwhile"
        except DataError as error:
            self._problem = str(error)
        self._renewed_at = now
