"""How unequally two answers follow prompts, without and with an edit, and what else the edit changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from errata.edits import Edit
from errata.errors import DataError
from errata.evaluation import likelihood, score
from errata.evaluation.check import answer_requests
from errata.evaluation.erasure import text_perplexity
from errata.evaluation.metrics.matching import answered
from errata.evaluation.observe import observe
from errata.host.host import Host
from errata.types import AskOptions, Case, Request

KINDS = ("bias", "coreference", "stereotype")
"""Kinds of probes that measure a bias: of professions and dama, winobias, stereoset."""
Scores = dict[str, float]
"""Scores of papers by name: a_s, a_f and b; WB.acc, dS and dG; LMS, SS and ICAT."""


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


def paper_scores(host: Host, edit: Edit, cases: Sequence[Case]) -> tuple[Scores, Scores]:
    """Return the papers' scores of a bias without and with an edit, of the cases' probes of :data:`KINDS`.

    Raises DataError where the cases have no such probe.
    """
    asked = bias_cases(cases)
    probes, options = [probe for case in asked for probe in case.probes], AskOptions(generate=False)
    before = iter(observe(host, probes, options))
    with edit.on(host):
        after = iter(observe(host, probes, options))
    table = [
        row for case in asked
        for row in score.rows(
            case, [next(before) for _ in case.probes], [next(after) for _ in case.probes], generated=False
        )
    ]  # fmt: skip
    summary = score.summarise(table)
    return score.legacy_scores(summary, side="before"), score.legacy_scores(summary)


def bias_cases(cases: Sequence[Case]) -> list[Case]:
    """Return cases with their probes of :data:`KINDS` alone. Raises DataError where none has any."""
    asked = [replace(case, probes=tuple(p for p in case.probes if p.kind in KINDS)) for case in cases]
    asked = [case for case in asked if case.probes]
    if not asked:
        kinds = sorted({probe.kind for case in cases for probe in case.probes})
        raise DataError(
            f"no probe measures a bias: expected kinds {', '.join(KINDS)}, found {', '.join(kinds) or 'none'}"
        )
    return asked


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
