"""Which prompts a text memory's entries are for: the routers that in-context methods offer, by one setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from errata.config import positive
from errata.edits.model import ModelEdit
from errata.edits.prompt import PromptEdit
from errata.edits.routers._router import Router
from errata.edits.routers.always import Always
from errata.edits.routers.fulltext import FullText
from errata.edits.routers.lexical import Lexical
from errata.edits.routers.similarity import Similarity
from errata.edits.routers.statement import Statement
from errata.errors import ConfigError, EditError
from errata.host.embedding import embed, encoder_digest
from errata.host.host import Host
from errata.locate.scope import ScopeData
from errata.methods._cross import CrossScope, open_router, with_requests
from errata.methods._method import Workspace, check_requests, provenance, resolve_layers, wide_layers
from errata.types import Request
from errata.writing import statement

Scope = Literal["always", "subject", "statement", "similar", "cross"]


@dataclass(frozen=True)
class TextScope(CrossScope):
    """Settings of a text memory's router."""

    threshold: float | None = None
    """Least value of the gate with scope statement (None: -0.1, chosen on the lab, seed 1), least cosine with scope
    similar (None: 0.5), least probability with scope cross (None: 0.5)."""
    gate_names: int = 8
    """Names per template among the statements that the gate of scope statement is fitted to."""

    def scope_problems(self) -> list[str]:
        """Check ranges."""
        complaints = (
            [] if self.gate_names > 0 else [f"gate_names: expected 1 or more, found {self.gate_names}"]
        )
        if self.threshold is not None and not -1 < self.threshold < 1:
            complaints.append(f"threshold: expected a value between -1 and 1, found {self.threshold}")
        return [*complaints, *self.cross_problems()]


def check_named(method: str, requests: Sequence[Request]) -> None:
    """Raise EditError for a subject in a picture alone, for memories that find their entries by names in a row's text:
    rows say where a picture stands and not which it is."""
    for number, request in enumerate(requests, 1):
        if any(picture.mark in request.subject for picture in request.pictures):
            raise EditError(
                f"{method} finds its entries by the subject's name, and the subject of request {request.id or number} "
                "is its picture; name it in the prompt, or use a method that reads states, as grace, melo or t_patcher"
            )


def scope_router(
    host: Host, requests: Sequence[Request], earlier: PromptEdit | ModelEdit | None, scope: Scope, settings: TextScope,
    work: Workspace, *, encoder: str | None = None,
) -> tuple[Router, str]:  # fmt: skip
    """Return a router with an entry for each request, an earlier edit's first, and the module that it reads.

    ``requests``: all of them, the earlier edit's first. ``always`` has one entry for all prompts; ``subject`` accepts
    prompts that name a request's subject; ``statement`` those of them that ask what the request states, see
    :class:`Statement`; ``similar`` those whose sentence vector is near that of the request's statement; ``cross`` those
    that a classifier accepts which reads the statement and the prompt together, see :class:`Cross`.
    """
    before = earlier.router if earlier is not None else None
    if scope == "always":
        return Always(), ""
    if scope == "subject":
        return Lexical(tuple(request.subject for request in requests)), ""
    if scope == "similar":
        old = [before.keys] if isinstance(before, Similarity) else []
        new = requests[sum(map(len, old)) :]
        texts = [statement(r.text, r.target, host.prompt_format.join) for r in new]
        keys = torch.cat([*old, embed(host, texts, encoder=encoder)])
        threshold = 0.5 if settings.threshold is None else settings.threshold
        return Similarity(keys, threshold, encoder, encoder_digest(host, encoder)), ""
    if scope == "cross":
        base = open_router(host, settings, encoder=encoder)
        return with_requests(host, base, requests, before, settings.threshold), ""
    (layer, *_) = resolve_layers(host, None, wide_layers)
    site = host.layout.site(layer)
    threshold = -0.1 if settings.threshold is None else settings.threshold
    done = before if isinstance(before, Statement) else None
    new = requests[len(done.phrases) if done else 0 :]
    data = ScopeData(host, work.tables(host), site, settings.gate_names, work.seed)
    gates = [data.gate(request) for request in new]
    weights = [*(done.weights if done else ()), *(gate.weight for gate in gates)]
    biases = [*(done.biases.tolist() if done else ()), *(gate.bias for gate in gates)]
    phrases = tuple(request.subject for request in requests)
    return Statement(phrases, torch.stack(weights), torch.tensor(biases), threshold), site.name


@dataclass(frozen=True)
class FactScope(TextScope):
    """Settings of a method that puts facts before prompts."""

    scope: Scope | None = None
    """Prompts that get facts: all of them get all facts, or each gets those about the subject it names; the one fact
    that states what it asks about its subject (``statement``); the one that it is similar to; or the one that a
    classifier finds it in the scope of, reading both (``cross``). None: all facts for up to ``most`` requests without
    an earlier edit, else by subject."""
    encoder: str | None = None
    """Name or folder of the sentence encoder of scope similar. None: the model's own hidden states."""
    most: int = 4
    """Facts up to which all are put before every prompt where ``scope`` is open."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*positive(self, "most"), *self.scope_problems()]


def facts_before_prompts(
    method: str, host: Host, requests: Sequence[Request], settings: FactScope, work: Workspace,
    line: Callable[[Request], str],
) -> PromptEdit:  # fmt: skip
    """Return the edit of a method that puts a line for each fact before the prompts that its scope says.

    One entry has all lines, those about one subject, or one line. The lines of an earlier edit's requests come first.
    """
    check_requests(method, requests)
    earlier: PromptEdit | None = work.after
    together = (*requests_of(earlier), *requests)
    few = earlier is None and len(requests) <= settings.most
    settings = replace(settings, scope=settings.scope or ("always" if few else "subject"))
    record = provenance(method, host, requests, settings, work)
    if settings.scope in ("statement", "similar", "cross"):
        router, module = scope_router(
            host, together, earlier, settings.scope, settings, work, encoder=settings.encoder
        )
        return PromptEdit(tuple(map(line, together)), router, record, module)
    by_subject: dict[str, str] = {}
    for request in together:
        subject = "" if settings.scope == "always" else request.subject
        by_subject[subject] = by_subject.get(subject, "") + line(request)
    subjects: Router = Always() if settings.scope == "always" else Lexical(tuple(by_subject))
    return PromptEdit(tuple(by_subject.values()), subjects, record)


def requests_of(edit: PromptEdit | ModelEdit | None) -> tuple[Request, ...]:
    """Return the requests of an edit that a fit goes on from; none without one."""
    return tuple(r for r in edit.provenance.requests if isinstance(r, Request)) if edit else ()


@dataclass(frozen=True)
class Retrieval:
    """Settings of how passages are found for a prompt."""

    retriever: Literal["vectors", "words"] = "vectors"
    """What passages are compared with prompts by: the cosine of sentence vectors, or BM25 of words in common."""
    encoder: str | None = None
    """Name or folder of the sentence encoder. None: the model's own hidden states."""


def passage_router(
    host: Host, texts: Sequence[str], earlier: PromptEdit | ModelEdit | None, retriever: Literal["vectors", "words"], *,
    threshold: float | None = None, encoder: str | None = None,
) -> Router:  # fmt: skip
    """Return a router over passages, an earlier edit's first: by sentence vectors, or by BM25.

    ``threshold``: cosine or BM25 that must be exceeded; None: -1 or 0. Raises ConfigError where the earlier edit has
    another router.
    """
    before = earlier.router if earlier is not None else None
    kind = Similarity if retriever == "vectors" else FullText
    if before is not None and not isinstance(before, kind):
        raise ConfigError(f"retriever: the earlier edit has a {before.name} router; go on with the same one")
    if retriever == "words":
        old = before.passages if isinstance(before, FullText) else ()
        return FullText((*old, *texts), 0.0 if threshold is None else threshold)
    old_keys = [before.keys] if isinstance(before, Similarity) else []
    keys = torch.cat([*old_keys, embed(host, texts, encoder=encoder)])
    least = -1.0 if threshold is None else threshold
    return Similarity(keys, least, encoder, encoder_digest(host, encoder))


def check_room(host: Host, name: str, template: str) -> None:
    """Raise ConfigError for a setting, a text around prompts, that takes more than three quarters of the window."""
    length = len(host.encode(template).ids)
    if host.window is not None and length > host.window // 2 + host.window // 4:
        raise ConfigError(
            f"{name}: {length} tokens leave too little of the window of {host.window}; shorten it"
        )
