"""What the unlearning methods have in common: what is forgotten, what is retained, and which weights change.

A request to forget is an ordinary one. What is forgotten is its old target, or, where it has none, what the model
answers now; its target is not trained. Retained are texts of the corpus that name no subject of a request, and on
demand the model's own statements, with its present answers. So no method sees a probe, and a file of one's own to
retain is given as the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import DataError, RequestError
from errata.host.host import Host
from errata.host.layout import Site
from errata.methods._method import Layers, Workspace, check_requests, notes, provenance, resolve_layers
from errata.methods._settings import StatementRows, at_least_zero
from errata.methods._statements import statement_companions
from errata.training.forget import Objective, Schedule, forget, joined, text_line
from errata.training.tune import Companions, rms
from errata.types import Request

PUBLISHED_RATE = 1e-5
"""AdamW's rate in plain numbers in the library of benchmarks open-unlearning."""


@dataclass(frozen=True)
class ForgetConfig:
    """Which answers are forgotten, and where."""

    layers: Layers = None
    """Layers whose feed-forward output projection is trained. None: the middle third (papers: all weights); wide: from
    a twelfth to five sixths of the depth."""
    steps: int = 30
    """Passes over the requests at most."""
    learning_rate: float | None = None
    """Adam's rate. None: 0.04 in root mean squares, chosen on the lab; 1e-5 in plain numbers (open-unlearning)."""
    scale: Literal["weight", "published"] = "weight"
    """Unit of the rate: the weight's root mean square, or plain numbers."""
    per_step: int | None = None
    """Requests per Adam step; all of them are still one of ``steps``. None: all at once."""
    retain_texts: int = 16
    """How many texts are retained, of the corpus, or without one written by the model (papers: a retain set)."""
    retain_tokens: int = 32
    """Their length in tokens at most."""
    answer_tokens: int = 16
    """Longest present answer, in tokens, that is asked of the model where a request has no old target."""

    def problems(self) -> list[str]:
        """Check ranges."""
        names = ("steps", "learning_rate", "per_step", "retain_texts", "answer_tokens")
        complaints = positive(self, *names)
        if self.retain_tokens < 2:
            complaints.append(f"retain_tokens: expected 2 or more, found {self.retain_tokens}")
        return complaints


@dataclass(frozen=True)
class UnlearnConfig(StatementRows, ForgetConfig):
    """Settings of methods whose loss is of the answers' likelihood."""

    retain: float = 1.0
    """Weight of the mean loss of the retained texts."""
    forgotten: float | None = 4.0
    """Nats per token of an answer from which on it is left alone; the fit ends once all are there. None: it runs all
    its steps (papers)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        own = [*self.own_problems(), *at_least_zero(self, "retain"), *positive(self, "forgotten")]
        return [*super().problems(), *own]


def middle(depth: int) -> tuple[int, ...]:
    """Return the middle third of so many layers, at least one."""
    return tuple(range(depth // 3, max(depth // 3 + 1, 2 * depth // 3)))


def to_forget(host: Host, requests: Sequence[Request], tokens: int, work: Workspace) -> list[Request]:
    """Return requests whose targets are what is to be forgotten. Raises RequestError where there is no answer."""
    answers = work.old_answers(host, requests, tokens)
    missing = [r.text for r, answer in zip(requests, answers, strict=True) if not answer.strip()]
    if missing:
        raise RequestError(
            f"the model gives no answer to {missing[0]!r:.80}, so there is nothing to forget; name it as the old target"
        )
    return [replace(r, target=answer, target_old=None) for r, answer in zip(requests, answers, strict=True)]


class RetainSettings(Protocol):
    """Which texts are retained."""

    @property
    def retain_texts(self) -> int: ...
    @property
    def retain_tokens(self) -> int: ...


def retained_ids(
    host: Host, requests: Sequence[Request], config: RetainSettings, work: Workspace
) -> list[tuple[int, ...]]:
    """Return the beginnings of texts that name no request's subject, as token ids of at least two tokens each.

    Raises DataError where all of them name one, so that there is nothing to retain.
    """
    texts = work.texts(host, config.retain_texts, config.retain_tokens)
    return without_subjects(texts, requests, "retain", "more retain_texts")


def without_subjects(
    texts: Sequence[tuple[str, tuple[int, ...]]], requests: Sequence[Request], purpose: str, remedy: str
) -> list[tuple[int, ...]]:
    """Return the token ids of texts that name no request's subject. Raises DataError, with a remedy, for none."""
    subjects = {request.subject for request in requests}
    found = [ids for text, ids in texts if not any(name in text for name in subjects)]
    if not found:
        raise DataError(
            f"every text to {purpose} names a subject of a request: give a longer corpus, or {remedy}"
        )
    return found


def rates(host: Host, sites: Sequence[Site], config: ForgetConfig, rate: float = 0.04) -> tuple[float, ...]:
    """Return Adam's rate at each site in plain numbers; ``rate``: the default, in root mean squares."""
    if config.scale == "published":
        return (config.learning_rate or PUBLISHED_RATE,) * len(sites)
    return tuple((config.learning_rate or rate) * rms(host.weight(site)) for site in sites)


def unlearn(
    method: str, host: Host, requests: Sequence[Request], config: UnlearnConfig, work: Workspace, objective: Objective
) -> WeightEdit:  # fmt: skip
    """Return the dense edit that makes the requests' old answers improbable by an objective."""
    check_requests(method, requests)
    layers = resolve_layers(host, config.layers, middle)
    sites = tuple(host.layout.site(layer) for layer in layers)
    answers = to_forget(host, requests, config.answer_tokens, work)
    own: Companions = statement_companions(host, requests, config, work)
    texts = retained_ids(host, requests, config, work) if config.retain else []
    retain = joined(own, [text_line(ids) for ids in texts], config.retain, len(requests))
    plan = Schedule(rates(host, sites, config), config.steps, config.forgotten, config.per_step)
    result = forget(
        host, answers, sites, objective, plan, retain=retain, rows=work.batch_size,
        tick=lambda *at: work.on_progress(method, *at),
    )  # fmt: skip
    resolved = replace(config, layers=layers)
    return WeightEdit(
        dict(result.changes),
        frozenset(site.parameter for site in sites if site.transposed),
        provenance(method, host, requests, resolved, work, **notes(result.facts())),
    )
