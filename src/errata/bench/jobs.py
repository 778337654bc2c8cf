"""The job table of a run: the state of each cell, its worker, and the end of the worker's lease.

One SQLite file. A worker takes a cell with a lease and renews it from a background thread, so a worker that died or
hangs loses the lease after :data:`LEASE` seconds and another one takes over the cell.
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
"""Seconds until a lease that is not renewed expires."""
MOST_ATTEMPTS = 3
"""Number of attempts after which a cell counts as failed, because its workers died."""

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    cell TEXT PRIMARY KEY, place INTEGER NOT NULL, state TEXT NOT NULL DEFAULT 'open',
    owner TEXT, lease_until REAL, attempts INTEGER NOT NULL DEFAULT 0, reason TEXT,
    seal TEXT
)"""


class LeaseLost(DataError):
    """Another worker has taken over the cell, because this one did not renew its lease in time."""


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
    """Return a name for a worker: machine, process id and a random part, so that others can tell if it is running."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


class Jobs:
    """The table in a file; each call is one transaction, so it may be used from any process and thread."""

    def __init__(
        self,
        path: Path,
        *,
        lease: float = LEASE,
        shared: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``shared``: the folder is shared by several machines, so SQLite's write-ahead log, which needs shared memory,
        must not be used."""
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
        """Create the table, and add every missing cell as open."""
        try:
            with closing(sqlite3.connect(self.path, timeout=60)) as table:
                table.execute(f"PRAGMA journal_mode={'DELETE' if self.shared else 'WAL'}")
        except sqlite3.Error as error:
            raise DataError(f"the job table {self.path} cannot be created: {error}") from error
        with self._open() as table:
            table.execute(_TABLE)
            if "seal" not in [
                line[1] for line in table.execute("PRAGMA table_info(jobs)")
            ]:  # an older version
                table.execute("ALTER TABLE jobs ADD COLUMN seal TEXT")
            table.executemany(
                "INSERT OR IGNORE INTO jobs (cell, place) VALUES (?, ?)",
                [(cell, place) for place, cell in enumerate(cells)],
            )

    def all(self) -> list[Job]:
        """Return all rows in the order of the plan."""
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
        """Lease the first of some cells that is open or whose lease has expired; None if there is none.

        A cell with too many unfinished attempts is set to failed instead.
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
                    self._end(table, cell, "failed", f"given up: {attempts} workers died while they ran it")
                    continue
                table.execute(
                    "UPDATE jobs SET state = 'leased', owner = ?, lease_until = ?, attempts = attempts + 1"
                    " WHERE cell = ?",
                    (owner, now + self.lease, cell),
                )
                return cell
        return None

    def renew(self, cell: str, owner: str) -> bool:
        """Renew the lease of a cell; False if the owner no longer has it."""
        with self._open() as table:
            update = table.execute(
                "UPDATE jobs SET lease_until = ? WHERE cell = ? AND owner = ? AND state = 'leased'",
                (self.clock() + self.lease, cell, owner),
            )
            return update.rowcount == 1

    def end(self, cell: str, owner: str, state: State, reason: str | None = None) -> None:
        """Set the final state of a cell. Raises LeaseLost if the owner no longer has it."""
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
        """Reopen the cells that are in one of some final states, and reset their numbers of attempts."""
        self._reopen([job.cell for job in self.all() if job.state in states and job.cell in set(cells)])

    def release(self, cell: str, owner: str | None) -> None:
        """Set a cell to open if it is still leased by this owner; the attempt counts."""
        with self._open() as table:
            table.execute(
                "UPDATE jobs SET state = 'open', owner = NULL, lease_until = NULL WHERE cell = ? AND owner = ?",
                (cell, owner),
            )

    def release_dead(self) -> None:
        """Release cells whose worker on this machine is no longer running."""
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
        """Reset the numbers of attempts of unfinished cells, when the user starts the run again."""
        with self._open() as table:
            table.execute("UPDATE jobs SET attempts = 0 WHERE state IN ('open', 'leased')")


def _is_running(owner: str | None) -> bool:
    """Whether a worker may be running; always true on another machine, where only its lease expires."""
    name, _, process = (owner or "").rpartition(":")[0].partition(":")
    if name != socket.gethostname() or not process.isdecimal():
        return bool(owner)
    return machine.is_running(int(process))


class Lease:
    """Keeps the lease of a cell while the block runs, by renewing it three times per lease period."""

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
        """Raise LeaseLost if this worker no longer has the cell; called before every write.

        When a suspended machine wakes up, the lease may have expired before the thread renews it: then it is renewed.
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
                self._problem = f"cell {self.cell} was taken over by another worker"
        except DataError as error:
            self._problem = str(error)
        self._renewed_at = now
