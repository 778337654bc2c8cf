"""A ledger's model with the ledger's edits in place, and methods' fits on top of them."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from errata.edits.edit import Edit, versions
from errata.edits.weight import WeightEdit
from errata.errors import LedgerError
from errata.host.host import Host
from errata.host.kinds import check_asked
from errata.job import Job, prepare, with_prompt_options
from errata.ledger.contents import load_edit
from errata.ledger.store import Ledger
from errata.loading import load
from errata.methods import REGISTRY
from errata.progress import OnProgress, ignore
from errata.types import DEFAULT_ASK, AskOptions, ImageRequest, Request


class Working:
    """The host of a ledger; edits are put in place as revisions ask for it, always in the ledger's order."""

    def __init__(self, ledger: Ledger, host: Host, *, on_progress: OnProgress = ignore) -> None:
        """Take a host without edits. Raises LedgerError if it is another one than the ledger was made for."""
        expected = ledger.state().model["fingerprint"]
        if host.fingerprint != expected:
            raise LedgerError(
                f"the ledger is about host {expected}, {host.name} is host {host.fingerprint}: another model or "
                "revision, or opened in another dtype; open the one that errata status names"
            )
        self.ledger, self.host, self.on_progress = ledger, host, on_progress
        self.active: tuple[str, ...] = ()
        self._edits: dict[str, Edit] = {}

    @classmethod
    def open(
        cls, ledger: Ledger, *, model: str | None = None, device: str | None = None, dtype: str | None = None,
        on_progress: OnProgress = ignore,
    ) -> Working:  # fmt: skip
        """Open the ledger's model, without edits; what is left out is as its settings say."""
        settings = ledger.settings
        host = load(model or settings.model, device=device or settings.device, dtype=dtype or settings.dtype)
        return cls(ledger, host, on_progress=on_progress)

    def edit(self, digest: str) -> Edit:
        """Return an edit of the ledger, read once; its file's bytes and digest are checked."""
        if digest not in self._edits:
            self._edits[digest] = load_edit(self.ledger, digest)
        return self._edits[digest]

    def require_text(self, what: str) -> None:
        """Raise LedgerError for a model that reads images, which cannot be asked."""
        if self.host.tokenizer is None:
            raise LedgerError(
                f"{self.host.name} reads images and gives no text: {what} asks for answers to prompts"
            )

    def edits(self, digests: Sequence[str] | None = None) -> list[Edit]:
        """Return several edits; default: those in place."""
        return [self.edit(one) for one in (self.active if digests is None else digests)]

    def show(self, digests: Sequence[str]) -> None:
        """Have exactly these edits in place, in this order; those that are in their place already stay there.

        Raises LedgerError or EditError if one cannot be read or put in place; then those before it are.
        """
        edits = self.edits(digests)
        kept = 0
        while kept < min(len(edits), len(self.active)) and self.active[kept] == digests[kept]:
            kept += 1
        for digest in reversed(self.active[kept:]):
            self.edit(digest).revert_(self.host)
            self.active = self.active[:-1]
        for edit in edits[kept:]:
            edit.apply_(self.host)
            self.active = (*self.active, edit.digest)

    @contextmanager
    def showing(self, digests: Sequence[str]) -> Generator[Host, None, None]:
        """Have these edits in place inside the block, and the earlier ones after it."""
        before = self.active
        self.show(digests)
        try:
            yield self.host
        finally:
            self.show(before)

    def fit(self, requests: Sequence[Request | ImageRequest], **order: Any) -> Edit:
        """Fit an edit on top of those in place, as :meth:`prepare` says; the host is left as it was."""
        with self._seen(order["method"], order.get("after")):
            return self.prepare(requests, **order).run()

    def prepare(
        self, requests: Sequence[Request | ImageRequest], *, method: str, options: Mapping[str, Any] | None = None,
        seed: int = 0, after: str | None = None, corpus: Any = None, examples: Any = None,
        ask: AskOptions = DEFAULT_ASK, batch_size: int | str = "auto",
    ) -> Job:  # fmt: skip
        """Validate a fit on top of the edits in place.

        Statistics, and what the host writes about itself, are the unedited host's. ``after``: an edit that the new
        one continues and includes; it is not in place then.
        """
        earlier = None if after is None else self.edit(after)
        return prepare(
            self.host, requests, method=method, options=options, seed=seed, after=earlier, corpus=corpus,
            examples=examples, ask=ask, batch_size=batch_size, beneath=self.edits(), on_progress=self.on_progress,
        )  # fmt: skip

    @contextmanager
    def _seen(self, method: str, after: str | None) -> Generator[None, None, None]:
        """Have in place what a method's fit sees: without the edit that it continues.

        A method that changes weights sees those edits that do so too; those that act at run time are taken off, as it
        would fit around them.
        """
        weights = REGISTRY.get(method).gives is WeightEdit
        seen = [
            d
            for d in self.active
            if d != after and not (weights and not isinstance(self.edit(d), WeightEdit))
        ]
        with self.showing(seen):
            yield

    def view(self, edit: Edit | None = None) -> Host:
        """Return the host with prompts formatted as an edit's were."""
        return self.host if edit is None else with_prompt_options(self.host, DEFAULT_ASK, edits=[edit])


def earlier_requests(working: Working, digests: Sequence[str]) -> list[Request]:
    """Return the requests about text of some edits, in order; of two about one fact, the later one."""
    found: dict[str, Request] = {}
    for digest in digests:
        for request in working.edit(digest).provenance.requests:
            if isinstance(request, Request):
                found[request.text] = request
    return list(found.values())


def describe(host: Host, name: str) -> dict[str, Any]:
    """Return what a ledger remembers of its model: name, fingerprint, hash of the weights, dtype, versions.

    Raises HostError for a model that cannot be asked for the answers that a ledger measures.
    """
    check_asked(host.name, host.kind, "a ledger")
    return {
        "name": name, "fingerprint": host.fingerprint, "weights": host.weights_hash(),
        "dtype": str(host.dtype).removeprefix("torch."), "family": host.family, "versions": versions(),
    }  # fmt: skip
