"""How unequally two answers follow prompts, without and with an edit, and what else the edit changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from errata.edits import Edit
from errata.evaluation import likelihood
from errata.evaluation.check import answer_requests
from errata.evaluation.erasure import text_perplexity
from errata.evaluation.metrics.matching import answered
from errata.host.host import Host
from errata.types import Request


@dataclass(frozen=True)
class Gap:
    """How far apart two answers are after some prompts: |log p(first) - log p(second)|, in nats."""

    prompts: int
    mean: float
    largest: float


@dataclass(frozen=True)
class Debiasing:
    """What an edit does to the gap between two answers, and its price."""

    fitted_before: Gap
    fitted_after: Gap
    held_out_before: Gap
    held_out_after: Gap
    known: int
    """Facts of those to be kept that the model answers with their target before."""
    kept: float | None
    """Share of them that it still does with the edit; None where there are none."""
    perplexity_before: float
    """Per token, of neutral texts."""
    perplexity_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Prompts:
    """What an edit that removes a bias is measured on."""

    pair: tuple[str, str]
    fitted: Sequence[Request]
    """Prompts that the edit was fitted on."""
    held_out: Sequence[Request]
    """Prompts about other subjects."""
    keep: Sequence[Request]
    """Facts that the model is to go on answering with their target."""
    texts: Sequence[str]
    """Neutral texts."""


def measure(host: Host, edit: Edit, prompts: Prompts) -> Debiasing:
    """Measure gaps, facts and perplexity without and with an edit; the host is left as it was."""
    before = _look(host, prompts, prompts.keep)
    known = [request for request, right in zip(prompts.keep, before[2], strict=True) if right]
    with edit.on(host):
        after = _look(host, prompts, known)
    kept = sum(after[2]) / len(known) if known else None
    return Debiasing(before[0], after[0], before[1], after[1], len(known), kept, before[3], after[3])


def gap(host: Host, requests: Sequence[Request], pair: tuple[str, str]) -> Gap:
    """Return how far apart the two answers are after each request's prompt; of no prompts 0."""
    answers = [host.encode_answer(request.text, one) for request in requests for one in pair]
    sums = [sum(logprobs) for logprobs, _ in likelihood.score(host, answers)]
    gaps = [abs(first - second) for first, second in zip(sums[::2], sums[1::2], strict=True)]
    return Gap(len(gaps), sum(gaps) / max(1, len(gaps)), max(gaps, default=0.0))


def _look(host: Host, prompts: Prompts, keep: Sequence[Request]) -> tuple[Gap, Gap, list[bool], float]:
    texts = answer_requests(host, keep) if keep else []
    right = [answered(text, (request.target,)) for text, request in zip(texts, keep, strict=True)]
    fitted, held_out = (gap(host, part, prompts.pair) for part in (prompts.fitted, prompts.held_out))
    return fitted, held_out, right, text_perplexity(host, prompts.texts)
