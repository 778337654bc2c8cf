"""Answers rows with different edits in one batch: rows join and leave it between two tokens.

One thread owns the model. At each step it takes up rows that came in, reads their prompts in a pass of their own, joins
them to those under way, and runs one pass for the next token of all. Rows whose caches cannot be joined (windows of
attention) are continued beside one another, one pass for each group.

Rows that need edits merged into the weights, see :mod:`errata.serve.shelf`, are a lane of their own; lanes take turns
of some steps each.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from errata.edits import Edit
from errata.errors import ErrataError
from errata.host import decoding
from errata.host.generation_settings import end_tokens
from errata.host.host import Host
from errata.host.placed import number_rows
from errata.serve.metrics import Metrics
from errata.serve.row import Row
from errata.serve.sampling import penalised, penalty_of
from errata.serve.shelf import Shelf

TURN = 16
"""Steps that a lane has before another one is taken up."""
LOG = logging.getLogger("errata.serve")


class Stopped(ErrataError):
    """The server is shutting down."""


@dataclass(eq=False)
class _Group:
    """Rows that are continued in one pass."""

    rows: list[Row]
    decoding: decoding.DecodingRows
    going: list[int]
    """Which of the rows go on."""

    def join(self, other: _Group) -> None:
        self.going += [len(self.rows) + i for i in other.going]
        self.rows += other.rows
        self.decoding.join(other.decoding)


@dataclass(eq=False)
class _Lane:
    """Rows for which the same edits are merged."""

    waiting: list[Row] = field(default_factory=list[Row])
    groups: list[_Group] = field(default_factory=list[_Group])

    @property
    def rows(self) -> list[Row]:
        return [*self.waiting, *(group.rows[i] for group in self.groups for i in group.going)]


class Engine:
    """The thread that runs the model."""

    def __init__(
        self, host: Host, load: Callable[[str], Edit], metrics: Metrics, *, most_rows: int = 32, foreign: bool = False
    ) -> None:  # fmt: skip
        """``load``: returns an edit by its digest; ``most_rows``: how many are continued at once, others wait.

        Raises HostError for a model whose generation settings cannot be followed.
        """
        self.host, self.metrics, self._most = host, metrics, most_rows
        self._penalty = penalty_of(host)
        self._ends = end_tokens(host)
        self._shelf = Shelf(host, load, foreign=foreign)
        self._changed = threading.Condition()
        self._inbox: deque[Row] = deque()
        self._orders: list[tuple[Sequence[str], Future[None]]] = []
        self._lanes: dict[tuple[str, ...], _Lane] = {}
        self._steps = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="errata-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present step; rows under way fail. Edits are taken off."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(self, row: Row) -> None:
        """Have a row answered. Raises Stopped once the engine was stopped."""
        with self._changed:
            if self._stopping:
                raise Stopped("the server is shutting down")
            self._inbox.append(row)
            self._changed.notify()

    def prepare(self, digests: Sequence[str]) -> Future[None]:
        """Put edits in place between two steps, ahead of the first row that asks for them, to stay there."""
        done: Future[None] = Future()
        with self._changed:
            if self._stopping:
                raise Stopped("the server is shutting down")
            self._orders.append((digests, done))
            self._changed.notify()
        return done

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._stopping

    @property
    def in_place(self) -> tuple[str, ...]:
        """Digests of the edits that are in place for rows that ask for them."""
        return self._shelf.in_place

    # --- the thread ------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._inbox or self._orders or self._lanes)
                if self._stopping:
                    break
                orders, self._orders = self._orders, []
                room = self._most - sum(len(lane.rows) for lane in self._lanes.values())
                new = [self._inbox.popleft() for _ in range(min(room, len(self._inbox)))]
            for digests, done in orders:
                self._prepare(digests, done)
            for row in new:
                self._admit(row)
            self._step()
        self._close()

    def _close(self) -> None:
        error = Stopped("the server is shutting down")
        for row in [*self._inbox, *(row for lane in self._lanes.values() for row in lane.rows)]:
            row.fail(error)
        for _, done in self._orders:
            done.set_exception(error)
        self._lanes = {}
        self._shelf.clear()

    def _prepare(self, digests: Sequence[str], done: Future[None]) -> None:
        try:
            self._shelf.wanted = frozenset(digests)
            self._shelf.take(digests)
            self._shelf.give_back(digests)
            done.set_result(None)
        except Exception as error:  # whoever waits is told
            done.set_exception(error)

    def _admit(self, row: Row) -> None:
        """Put a row's edits in place and give it to its lane."""
        if row.cancelled:
            return
        try:
            places = self._shelf.take(row.question.edits)
        except Exception as error:  # whoever asked is told; others are not concerned
            row.fail(error)
            return
        row.numbers = places.numbers
        self._lanes.setdefault(places.merged, _Lane()).waiting.append(row)

    def _step(self) -> None:
        """Run one step of the lane whose turn it is."""
        if not self._lanes:
            return
        key, lane = next(iter(self._lanes.items()))
        begin = perf_counter()
        try:
            self._shelf.merge(key)
            self._drop_cancelled(lane)
            self._read(lane)
            for group in lane.groups:
                self._advance(group)
        except Exception as error:  # a failure costs the rows of this lane, not the server
            if not isinstance(error, ErrataError):
                LOG.exception("a step of the engine failed")
            self._fail(lane, error)
        lane.groups = [group for group in lane.groups if group.going]
        self.metrics.step(perf_counter() - begin, sum(len(one.rows) for one in self._lanes.values()))
        self._steps += 1
        if not lane.rows:
            del self._lanes[key]
            self._steps = 0
        elif len(self._lanes) > 1 and self._steps >= TURN:
            self._lanes[key] = self._lanes.pop(key)  # to the end of the line
            self._steps = 0
        if not self._lanes:
            self._shelf.merge(())

    def _fail(self, lane: _Lane, error: Exception) -> None:
        for row in lane.rows:
            self._leave(row)
            row.fail(error)
        lane.waiting, lane.groups = [], []

    def _leave(self, row: Row) -> None:
        if not row.left:
            row.left = True
            self._shelf.give_back(row.question.edits)

    def _drop_cancelled(self, lane: _Lane) -> None:
        for row in lane.rows:
            if row.cancelled:
                self._leave(row)
        lane.waiting = [row for row in lane.waiting if not row.cancelled]
        for group in lane.groups:
            group.going = [i for i in group.going if not group.rows[i].cancelled]

    def _read(self, lane: _Lane) -> None:
        """Read the prompts of new rows, take their first tokens, and join them to rows under way."""
        rows, lane.waiting = lane.waiting, []
        readable: list[Row] = []
        for row in rows:
            try:
                row.read(self.host)
                readable.append(row)
            except Exception as error:  # say a prompt that is too long; the others go on
                self._leave(row)
                row.fail(error)
        if not readable:
            return
        try:
            sets = number_rows([row.numbers for row in readable])
            prefixes = decoding.run_prefixes(self.host, [row.prompt for row in readable], sets)
            going = self._take_tokens(readable, prefixes.logits)
        except Exception as error:  # these rows are in no group yet
            LOG.exception("prompts could not be read")
            for row in readable:
                self._leave(row)
                row.fail(error)
            return
        if not going:
            return
        group = _Group([readable[i] for i in going], decoding.DecodingRows(self.host, prefixes, going), [])
        group.going = list(range(len(going)))
        for other in lane.groups:
            if other.going and other.decoding.can_join(group.decoding):
                other.join(group)
                return
        lane.groups.append(group)

    def _advance(self, group: _Group) -> None:
        """Run one pass and take the next token of each row."""
        if not group.going:
            return
        going = group.going
        group.rows = [group.rows[i] for i in going]
        group.going = list(range(len(going)))
        logits = group.decoding.step(going, [row.new[-1] for row in group.rows])
        group.going = self._take_tokens(group.rows, logits)

    def _take_tokens(self, rows: Sequence[Row], logits: Tensor) -> list[int]:
        """Choose the next token of each row by its logits ``[rows, vocab]``; return which rows go on."""
        best = logits.argmax(-1).tolist()
        going: list[int] = []
        for i, row in enumerate(rows):
            token = int(best[i])
            if row.generator is not None or self._penalty != 1.0:
                token = self._choose(row, logits[i])
            self.metrics.tokens.inc()
            if row.accept(self.host, token, self._ends):
                going.append(i)
            else:
                self._leave(row)
        return going

    def _choose(self, row: Row, logits: Tensor) -> int:
        if self._penalty != 1.0:
            logits = penalised(logits, (*row.prompt, *row.new), self._penalty)
        if row.generator is None:
            return int(logits.argmax())
        return row.question.sampling.draw(logits, row.generator)
