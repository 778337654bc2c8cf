"""How much is left of answers that an edit makes a model forget, and what it cost.

Asked by free generation and by likelihood, without and with the edit, and again after two attacks that bring back what
was only covered up: rounding all weights to few bits, and training on some of the answers while asking for the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from errata import config as settings
from errata.bench import muse, runner
from errata.edits.edit import Edit
from errata.errors import RequestError
from errata.evaluation import likelihood
from errata.evaluation.check import answer_requests, compare_answers
from errata.evaluation.metrics import perplexity
from errata.host.host import Host
from errata.job import workspace
from errata.linalg.rounding import rounded
from errata.linalg.samples import ks_p_value
from errata.methods import REGISTRY
from errata.progress import OnProgress, ignore
from errata.training.tune import with_weights
from errata.types import Request

if TYPE_CHECKING:
    from errata.methods._method import Workspace

RELEARN = (1, 2, 4, 8)
"""Steps of fine-tuning after which is asked."""
BITS = (8, 4)
"""To which weights are rounded."""
TOKENS = 16
"""Longest present answer of a request without an old target."""
TEXTS = 50
"""Neutral texts, for perplexity."""


@dataclass(frozen=True)
class Recall:
    """How well a model gives some answers, each in [0, 1]."""

    given: float
    """Share that free generation gives."""
    probability: float
    """Mean over answers of their tokens' geometric mean probability."""


@dataclass(frozen=True)
class Audit:
    """What was measured of an edit that forgets."""

    answers: tuple[str, ...]
    """What was to be forgotten, in the order of the requests."""
    unedited: Recall
    edited: Recall
    perplexity: tuple[float, float]
    """Of neutral text, without and with the edit."""
    kept: float | None = None
    """Requests to keep that are answered with their target, of those that are without the edit; None without any."""
    forget_quality: tuple[float, float] | None = None
    """p-value of the test that truth ratios are those of a model that never learned the answers, without and with the
    edit; None without such a model. It falls with the number of requests."""
    leakage: tuple[float, float] | None = None
    """Privacy leakage in per cent, without and with the edit, see :func:`errata.bench.muse.privacy_leakage`; None
    without such a model or without requests that nobody was taught."""
    reworded: tuple[Recall, Recall] | None = None
    """Of the same answers asked for in other words, without and with the edit; None without such requests."""
    rounded: Mapping[int, tuple[Recall, Recall]] = field(default_factory=dict[int, tuple[Recall, Recall]])
    """By bits, without and with the edit."""
    relearned: Mapping[int, Recall] = field(default_factory=dict[int, Recall])
    """By steps of training on every second request, asked for the others."""

    def to_dict(self) -> dict[str, Any]:
        """Return the audit as plain data."""
        return asdict(self)


def audit(
    host: Host, edit: Edit, *, keep: Sequence[Request] = (), attacks: bool = False,
    reference: Host | None = None, outsiders: Sequence[Request] = (), reworded: Sequence[Request] = (),
    seed: int = 0, on_progress: OnProgress = ignore,
) -> Audit:  # fmt: skip
    """Measure what an edit's requests were to make a host forget; the host is left as it was.

    ``keep``: requests whose target is to be answered as before. ``attacks``: round and relearn as well; the latter
    needs two requests. ``reference``: a model that was trained without the answers, for the forget quality.
    ``outsiders``: requests that neither model was taught, target included; with a reference, the privacy leakage is
    measured beside them. ``reworded``: requests that ask for the same answers, their targets, in other words. Raises
    RequestError for an edit without requests about text, and where a reference is given and no two requests have one
    prompt and different answers.
    """
    requests = [request for request in edit.provenance.requests if isinstance(request, Request)]
    if not requests:
        raise RequestError(f"edit {edit.digest} has no requests about text, so there is nothing to ask for")
    work = workspace(host, seed=seed, on_progress=on_progress)
    old = work.old_answers(host, requests, TOKENS)
    answers = [replace(r, target=text, target_old=None) for r, text in zip(requests, old, strict=True)]
    texts = runner.neutral_texts(host, work)[:TEXTS]
    before = recall(host, answers)
    known = [one.request for one in _check(host, keep) if one.answered]
    started, ratios = perplexity_of(host, texts), _compared(host, answers) if reference else []
    goal = _compared(reference, answers) if reference else []
    member = _Membership(answers, outsiders, reference) if reference and outsiders else None
    leaked = member.leakage(host) if member else 0.0
    other = recall(host, reworded) if reworded else None
    plain = {bits: _recall_rounded(host, answers, bits) for bits in (BITS if attacks else ())}
    with edit.on(host):
        on_progress("asking with the edit", 0, 1)
        after, ended = recall(host, answers), perplexity_of(host, texts)
        kept = _check(host, known)
        quality = (ks_p_value(ratios, goal), ks_p_value(_compared(host, answers), goal)) if goal else None
        leakage = (leaked, member.leakage(host)) if member else None
        others = (other, recall(host, reworded)) if other else None
        pairs = {bits: (one, _recall_rounded(host, answers, bits)) for bits, one in plain.items()}
        relearned = _relearn(host, answers, work, on_progress) if attacks and len(answers) > 1 else {}
    return Audit(
        tuple(old), before, after, (started, ended),
        sum(one.answered for one in kept) / len(kept) if kept else None, quality, leakage, others, pairs, relearned,
    )  # fmt: skip


class _Membership:
    """How well a model's probabilities tell answers that were taught from others, beside a reference's."""

    def __init__(self, answers: Sequence[Request], outsiders: Sequence[Request], reference: Host) -> None:
        self.members, self.others = membership_texts(answers, outsiders)
        self.reference = muse.separation(reference, self.members, self.others)

    def leakage(self, host: Host) -> float:
        """Return the privacy leakage of a host as it is now."""
        return muse.privacy_leakage(muse.separation(host, self.members, self.others), self.reference)


def membership_texts(answers: Sequence[Request], outsiders: Sequence[Request]) -> tuple[list[str], list[str]]:
    """Return sentences that state answers, and those that nobody was taught.

    Of the answers, those with a prompt that outsiders have too, where there are any: what else differs is no
    membership.
    """
    prompts = {one.template for one in outsiders}
    shared = [one for one in answers if one.template in prompts] or list(answers)
    return [f"{one.text} {one.target}." for one in shared], [f"{one.text} {one.target}." for one in outsiders]


def truth_ratios(host: Host, answers: Sequence[Request]) -> list[float]:
    """Return, for each request, how probable wrong answers are over the right one, per token.

    Wrong ones are those of the other requests with the same prompt, by the geometric mean of their probabilities; a
    request without any is left out. Source: TOFU, Maini et al., arXiv 2401.06121, Sec. 2.2.2, whose right answer is
    paraphrased.
    """
    wrong = [
        sorted({o.target for o in answers if o.template == one.template} - {one.target}) for one in answers
    ]
    pairs = [(one, [one.target, *others]) for one, others in zip(answers, wrong, strict=True) if others]
    rows = [host.encode_answer(one.text, text) for one, texts in pairs for text in texts]
    means = iter([sum(logprobs) / len(logprobs) for logprobs, _ in likelihood.score(host, rows)])
    ratios: list[float] = []
    for _, texts in pairs:
        right, *others = [next(means) for _ in texts]
        ratios.append(math.exp(sum(others) / len(others) - right))
    return ratios


def _compared(host: Host, answers: Sequence[Request]) -> list[float]:
    """Return truth ratios. Raises RequestError where no request has a wrong answer."""
    ratios = truth_ratios(host, answers)
    if not ratios:
        raise RequestError(
            "forget quality compares a request's answer with those of others with the same prompt, and here no two "
            "have one prompt and different answers: leave the reference out"
        )
    return ratios


def recall(host: Host, answers: Sequence[Request]) -> Recall:
    """Return how well a host gives the targets of some requests as it is now."""
    given = sum(one.answered for one in _check(host, answers)) / len(answers)
    rows = [host.encode_answer(request.text, request.target) for request in answers]
    scores = [logprobs for logprobs, _ in likelihood.score(host, rows)]
    return Recall(given, sum(math.exp(sum(row) / len(row)) for row in scores) / len(scores))


def _check(host: Host, requests: Sequence[Request]) -> Sequence[Any]:
    if not requests:
        return ()
    texts = answer_requests(host, requests)
    return compare_answers(requests, texts, texts).requests


def perplexity_of(host: Host, texts: Sequence[str]) -> float:
    """Return the perplexity of some texts."""
    return perplexity.of_texts([torch.tensor(row) for row in likelihood.rolling(host, texts)])


def _recall_rounded(host: Host, answers: Sequence[Request], bits: int) -> Recall:
    """Return the recall with all matrices of the blocks rounded; no weight is written."""
    blocks = tuple(f"{name}." for name in host.layout.blocks)
    weights = {
        name: rounded(p.detach(), bits)
        for name, p in host.model.named_parameters()
        if p.ndim == 2 and name.startswith(blocks)
    }
    return with_weights(host, weights, lambda: recall(host, answers))


def _relearn(
    host: Host, answers: Sequence[Request], work: Workspace, on_progress: OnProgress
) -> dict[int, Recall]:
    """Fine-tune on every second answer for some steps, from the host as it is, and ask for the others."""
    method = REGISTRY.get("ft")
    result: dict[int, Recall] = {}
    for number, steps in enumerate(RELEARN):
        on_progress("relearning", number, len(RELEARN))
        config = settings.make(method.config, {"steps": steps}, "ft")
        with method.run(host, answers[::2], config, work).on(host):
            result[steps] = recall(host, answers[1::2])
    return result
