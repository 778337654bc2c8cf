"""The ledger's side of the server: what may be asked for now, and the one writer that changes it.

Edits are fitted and measured on a second copy of the model, opened when the first one is asked for, in a thread of
their own; so answers go on meanwhile, and no fit meets another. What is to be in place next is put in place on the
served model first, for rows that ask for it, and then a new catalogue takes the place of the old one: a request is
answered by the catalogue that it came in under.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from threading import Lock
from typing import Any, TypeVar

from errata.edits import Edit
from errata.errors import ErrataError, LedgerError
from errata.ledger import reverting
from errata.ledger.contents import load_edit
from errata.ledger.recording import Attempt, Order, Recording, apply_again, record, request_dict, verify
from errata.ledger.store import Ledger
from errata.ledger.working import Working
from errata.methods import REGISTRY
from errata.serve.catalogue import Catalogue, guard_report
from errata.serve.engine import Engine
from errata.serve.errors import ApiError
from errata.serve.metrics import Metrics
from errata.types import Request

WAITING = 8
"""Most orders that wait for the writer."""
LOG = logging.getLogger("errata.serve")
T = TypeVar("T")


class Desk:
    """Holds the catalogue; with a ledger also takes orders, one at a time."""

    def __init__(
        self, catalogue: Catalogue, metrics: Metrics, *, files: Sequence[Edit] = (), ledger: Ledger | None = None,
        open_working: Callable[[Ledger], Working] = Working.open,
    ) -> None:  # fmt: skip
        """``files``: edits that no ledger holds. ``open_working``: opens the copy that edits are fitted on."""
        self.catalogue, self.ledger, self._metrics = catalogue, ledger, metrics
        self._files = {edit.digest: edit for edit in files}
        self._open = open_working
        self._working: Working | None = None
        self._engine: Engine | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="errata-writer")
        self._publishing, self._counting = Lock(), Lock()
        self._waiting = 0
        metrics.edits.set(len(catalogue.active))

    def serve_with(self, engine: Engine) -> None:
        """Name the engine on which edits are put in place ahead."""
        self._engine = engine

    def load(self, digest: str) -> Edit:
        """Return an edit by its digest. Raises LedgerError for a missing or damaged one."""
        if digest in self._files:
            return self._files[digest]
        if self.ledger is None:
            raise LedgerError(f"there is no edit {digest}")
        return load_edit(self.ledger, digest)

    def close(self) -> None:
        """Wait for the order under way, drop those that wait, and close the ledger."""
        self._writer.shutdown(wait=True, cancel_futures=True)
        if self.ledger is not None:
            self.ledger.close()

    # --- orders ----------------------------------------------------------------------------

    def order(self, work: Callable[[Ledger], T]) -> Future[T]:
        """Have the writer do something and publish what is in place then.

        Raises ApiError: 409 without a ledger, 503 where too many orders wait.
        """
        ledger = self.ledger
        if ledger is None:
            raise ApiError(
                409, "this server has no ledger: start errata serve with --repo to make, apply or revert edits",
                "no_ledger",
            )  # fmt: skip
        with self._counting:
            if self._waiting >= WAITING:
                raise ApiError(503, f"{WAITING} orders wait for the writer already; try again later", "busy")
            self._waiting += 1

        def run() -> T:
            try:
                return work(ledger)
            finally:  # of an order that fails, attempts before the failure may be in place
                self.publish()

        done = self._writer.submit(run)
        done.add_done_callback(self._done)
        return done

    def _done(self, _: Future[Any]) -> None:
        with self._counting:
            self._waiting -= 1

    def make(self, requests: Sequence[Request], order: Order) -> Future[Recording]:
        """Fit an edit, measure it and apply it if it keeps the guard's bounds."""
        check_settings(order.method, order.options)
        return self.order(lambda ledger: record(self._ready(ledger), requests, order))

    def apply(self, name: str, order: Order) -> Future[Attempt]:
        """Apply an edit of the ledger that is not in place, measured anew."""
        return self.order(lambda ledger: apply_again(self._ready(ledger), name, order))

    def revert(self, name: str, *, reason: str, author: str) -> Future[dict[str, Any]]:
        """Take an edit off; its event as plain data."""
        return self.order(
            lambda ledger: reverting.revert(ledger, name, reason=reason, author=author).to_dict()
        )

    def verify(self, name: str, *, reason: str, author: str) -> Future[dict[str, Any]]:
        """Measure an edit again; the verdict as plain data."""

        def work(ledger: Ledger) -> dict[str, Any]:
            verdict = verify(self._ready(ledger), name, reason=reason, author=author)
            body = {} if verdict is None else verdict.to_dict()
            return {**body, "report": guard_report(body)}

        return self.order(work)

    def publish(self) -> None:
        """Have requests from now on answered by what the ledger says now."""
        if self.ledger is None:
            return
        with self._publishing:  # of two that look at once, the later look counts
            before = self.catalogue
            if len(self.ledger.state().ids) == before.events:
                return
            after = Catalogue.of_ledger(before.base, self.ledger)
            if self._engine is not None and after.active != before.active:
                try:
                    self._engine.prepare(after.active).result()
                except ErrataError as error:  # rows that ask for it are told the same
                    LOG.error("what the ledger has in place cannot be put in place: %s", error)
            self.catalogue = after
            self._metrics.edits.set(len(after.active))
            if after.active != before.active:
                self._metrics.revisions.inc()

    def _ready(self, ledger: Ledger) -> Working:
        """Return the copy of the model, with what is in place now."""
        if self._working is None:
            self._working = self._open(ledger)
        self._working.show(ledger.state().active)
        return self._working


def check_settings(method: str, options: Mapping[str, Any]) -> None:
    """Raise ApiError for a setting that names a file or a model: over HTTP no name becomes a path.

    Those are the settings that are a text or left out.
    """
    config = REGISTRY.get(method).config
    named = [one.name for one in fields(config) if str(one.type) == "str | None" and one.name in options]
    if named:
        raise ApiError(
            400, f"{', '.join(named)}: names a file or a model, which a request cannot; use errata edit on the server",
            "setting_refused", param="settings",
        )  # fmt: skip


def attempt_document(attempt: Attempt) -> dict[str, Any]:
    """Return an attempt as plain data."""
    verdict = {} if attempt.verdict is None else attempt.verdict.to_dict()
    return {
        "id": attempt.edit, "applied": attempt.applied, "replaces": list(attempt.replaced),
        "requests": [request_dict(one) for one in attempt.requests], **verdict, "report": guard_report(verdict),
    }  # fmt: skip


def recording_document(recording: Recording) -> dict[str, Any]:
    """Return the outcome of an order as plain data."""
    return {
        "object": "recording", "passed": recording.passed,
        "attempts": [attempt_document(one) for one in recording.attempts],
        "failed": [request_dict(one) for one in recording.failed],
        "conflicts": [one.to_dict() for one in recording.conflicts],
    }  # fmt: skip
