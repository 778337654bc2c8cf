"""Make edits through a ledger: fit, measure, and apply what keeps the guard's bounds. Every attempt is recorded.

A batch that fails is halved, and each half is fitted again on top of what was applied before it, until what fails is a
single request. Nothing of a failed attempt is in place; its edit and what was measured stay in the ledger. A method
that takes one request at a time gets them one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from errata.edits.edit import Edit
from errata.errors import LedgerError, StateChanged
from errata.ledger import conflicts
from errata.ledger.conflicts import Conflict
from errata.ledger.contents import facts_of, keep
from errata.ledger.events import SHORT, Event
from errata.ledger.guard import Guard, Verdict, judge
from errata.ledger.reverting import take_out
from errata.ledger.settings import Policy
from errata.ledger.working import Working, earlier_requests
from errata.methods import REGISTRY
from errata.types import DEFAULT_ASK, AskOptions, ImageRecord, ImageRequest, Request

ATTEMPTS = 5
"""How often an edit is measured anew because another process changed what is in place."""


@dataclass(frozen=True)
class Order:
    """What a user asks for: everything about an edit but its requests."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    seed: int = 0
    after: str | None = None
    """Digest of an edit in place that the new one continues, includes and takes the place of."""
    corpus: Any = None
    examples: Any = None
    ask: AskOptions = DEFAULT_ASK
    batch_size: int | str = "auto"
    reason: str = ""
    source: str = ""
    author: str = ""
    guard: bool = True
    """Whether an edit out of bounds is refused; what is measured is recorded either way."""
    halve: bool = True
    """Whether a failed batch is halved."""
    conflicts: Policy | None = None
    """None: as the ledger's settings say."""


@dataclass(frozen=True)
class Attempt:
    """One edit that was fitted and measured."""

    requests: tuple[Request | ImageRequest, ...]
    edit: str
    """Its digest."""
    verdict: Verdict | None
    """None for images, which have no text to measure."""
    applied: bool
    replaced: tuple[str, ...] = ()
    """Digests of the edits that it took the place of."""


@dataclass(frozen=True)
class Recording:
    """The outcome of an order."""

    attempts: tuple[Attempt, ...]
    conflicts: tuple[Conflict, ...] = ()

    @property
    def applied(self) -> list[Attempt]:
        """Attempts whose edit is in place."""
        return [one for one in self.attempts if one.applied]

    @property
    def passed(self) -> bool:
        """Whether all requests are in place."""
        return not self.failed

    @property
    def failed(self) -> list[Request | ImageRequest]:
        """Requests that are in no applied edit."""
        held = [r for one in self.applied for r in one.requests]
        asked = [r for one in self.attempts for r in one.requests]
        return [r for i, r in enumerate(asked) if r not in held and r not in asked[:i]]


def record(working: Working, requests: Sequence[Request | ImageRequest], order: Order) -> Recording:
    """Fit an edit of some requests on top of those in place, measure it and apply it if it keeps its bounds.

    Raises ConflictError, with nothing fitted, for requests that contradict edits in place under the policy ``error``.
    """
    ledger = working.ledger
    state = ledger.state()
    policy = order.conflicts or ledger.settings.conflicts
    found = [] if order.after else conflicts.find(ledger, state, [request_dict(r) for r in requests])
    giving_way = conflicts.to_replace(found, policy)
    guard = guard_of(working)
    if giving_way:
        make_way(working, giving_way, order)
    recorder = Recorder(working, order, guard)
    together = REGISTRY.get(order.method).batch
    for group in [tuple(requests)] if together else [(one,) for one in requests]:
        recorder.add(group)
    return Recording(tuple(recorder.attempts), tuple(found))


def measure(
    working: Working, guard: Guard | None, edit: Edit, requests: Sequence[Any], *, before: Sequence[str],
    rest: Sequence[str],
) -> Verdict | None:  # fmt: skip
    """Measure an edit on top of others, by their digests; None without a guard.

    ``requests``: those that it has to answer. ``before``: what is in place without it; ``rest``: what of that stays
    with it.
    """
    if guard is None:
        return None
    texts = [one for one in requests if isinstance(one, Request)]
    guard = replace(guard, host=working.view(edit))
    working.show(before)
    seen = guard.before(texts, earlier_requests(working, before))
    with working.showing(rest), edit.on(working.host):
        measured = guard.measure(seen, edit, working.edits(rest))
    return judge(measured, guard.settings.bounds)


def verify(working: Working, name: str, *, reason: str = "", author: str = "") -> Verdict | None:
    """Measure an edit of the ledger again, beside all others in place, and record what was measured.

    What is in place stays as it is. ``name``: see :meth:`State.find_edit`. None for a model that reads images.
    """
    state = working.ledger.state()
    digest = state.find_edit(name).digest
    rest = [one for one in state.active if one != digest]
    edit = working.edit(digest)
    verdict = measure(working, guard_of(working), edit, edit.provenance.requests, before=rest, rest=rest)
    working.show(state.active)
    body = {"guard": True, **({} if verdict is None else verdict.to_dict())}
    working.ledger.append("verified", edit=digest, body=body, reason=reason, author=author)
    return verdict


def apply_again(working: Working, name: str, order: Order) -> Attempt:
    """Apply an edit of the ledger that is not in place, say one that was reverted, if it keeps the guard's bounds now.

    Raises LedgerError for one that is in place, ConflictError where its requests contradict edits in place.
    """
    ledger = working.ledger
    state = ledger.state()
    one = state.find_edit(name)
    if one.digest in state.active:
        raise LedgerError(f"edit {one.short} is in place already")
    found = conflicts.find(ledger, state, one.requests)
    giving_way = conflicts.to_replace(found, order.conflicts or ledger.settings.conflicts)
    guard = guard_of(working)
    if giving_way:
        make_way(working, giving_way, order)
    working.show(ledger.state().active)
    # why it was made still holds, where nothing new is said
    order = replace(order, reason=order.reason or one.event.reason, source=order.source or one.event.source)
    edit = working.edit(one.digest)
    return Recorder(working, order, guard).apply(edit, edit.provenance.requests, one.facts)  # type: ignore[arg-type]


def request_dict(request: Request | ImageRequest | ImageRecord) -> dict[str, Any]:
    """Return a request as an edit records it."""
    return (request.record if isinstance(request, ImageRequest) else request).to_dict()


def guard_of(working: Working) -> Guard | None:
    """Return the guard of a ledger's host as its settings say; None for a host that reads images."""
    if working.host.tokenizer is None:
        return None
    with working.showing(()):
        return Guard.of(working.host, working.ledger.settings.guard, on_progress=working.on_progress)


def make_way(working: Working, giving_way: Sequence[Conflict], order: Order) -> None:
    """Take requests out of edits in place. Raises LedgerError where an edit cannot be taken apart."""
    by_edit: dict[str, list[int]] = {}
    for one in giving_way:
        by_edit.setdefault(one.other, []).append(one.other_request)
    for digest, numbers in by_edit.items():
        take_out(working.ledger, digest, numbers, reason=order.reason, author=order.author)
    working.show(working.ledger.state().active)


@dataclass
class Recorder:
    """Attempts on one order."""

    working: Working
    order: Order
    guard: Guard | None
    attempts: list[Attempt] = field(default_factory=list[Attempt])

    def add(self, requests: tuple[Request | ImageRequest, ...]) -> None:
        """Attempt requests together; if they fail, each half by itself."""
        attempt = self._attempt(requests)
        self.attempts.append(attempt)
        if attempt.applied or len(requests) == 1 or not self.order.halve:
            return
        middle = len(requests) // 2
        self.add(requests[:middle])
        self.add(requests[middle:])

    def _attempt(self, requests: tuple[Request | ImageRequest, ...]) -> Attempt:
        order, working, ledger = self.order, self.working, self.working.ledger
        working.show(ledger.state().active)
        edit = working.fit(
            requests, method=order.method, options=order.options, seed=order.seed, after=self._after(),
            corpus=order.corpus, examples=order.examples, ask=order.ask, batch_size=order.batch_size,
        )  # fmt: skip
        return self.apply(edit, requests, facts_of(edit, keep(ledger, edit), working.active))

    def apply(
        self, edit: Edit, requests: tuple[Request | ImageRequest, ...], facts: Mapping[str, Any]
    ) -> Attempt:
        """Record an edit, measure it on top of what is in place, and apply it if it keeps its bounds."""
        order, working, ledger = self.order, self.working, self.working.ledger
        self._append("proposed", edit, facts)
        for _ in range(ATTEMPTS):
            state = ledger.state()
            replaces = [one for one in (self._after(),) if one is not None and one in state.active]
            rest = [one for one in state.active if one not in replaces]
            verdict = measure(working, self.guard, edit, requests, before=state.active, rest=rest)
            body = {"guard": order.guard, **({} if verdict is None else verdict.to_dict())}
            self._append("verified", edit, body)
            if verdict is not None and order.guard and not verdict.passed:
                return Attempt(requests, edit.digest, verdict, False)
            try:
                self._append("applied", edit, {"replaces": replaces}, expected=state.active)
            except StateChanged:
                continue
            working.show(ledger.state().active)
            return Attempt(requests, edit.digest, verdict, True, tuple(replaces))
        raise LedgerError(
            f"edit {edit.digest[:SHORT]} was measured {ATTEMPTS} times, and each time other edits were applied "
            "meanwhile; it is recorded but not in place"
        )

    def _after(self) -> str | None:
        """Return the edit to continue: that of the order, or the half that was applied in its place."""
        applied = [one.edit for one in self.attempts if one.applied]
        return applied[-1] if self.order.after and applied else self.order.after

    def _append(
        self, kind: Any, edit: Edit, body: Mapping[str, Any], expected: Sequence[str] | None = None
    ) -> Event:
        order = self.order
        return self.working.ledger.append(
            kind, edit=edit.digest, body=body, reason=order.reason, source=order.source, author=order.author,
            expected=expected,
        )  # fmt: skip
