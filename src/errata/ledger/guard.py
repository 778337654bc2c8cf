"""The guard: measures what an edit does beside its own facts, and says whether that is within a ledger's bounds.

Everything is measured twice on one host, without and with the edit, on top of the edits that are in place: answers by
free generation to the edit's requests, to those of earlier edits, to other statements about the subjects, and to
canary prompts; the next token's distribution behind canaries and beginnings of neutral texts; perplexity of neutral
text; norms of weights. Statements and canaries are what the unedited model completes by itself, taken from its tables
(:mod:`errata.stats.tables`); a ledger's settings add canaries of one's own. An edit that answers its requests and
breaks the rest fails.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from errata.bench import health, runner
from errata.edits.edit import Edit
from errata.edits.weight import WeightEdit, add_deltas, delta_norm
from errata.evaluation import likelihood
from errata.evaluation.check import answer_requests, compare_answers
from errata.evaluation.metrics import matching, perplexity
from errata.evaluation.observe import observe
from errata.host.host import Host
from errata.job import workspace
from errata.ledger.settings import LEAST, MOST, Bounds, GuardSettings
from errata.locate.own import OwnCounts, own_text
from errata.progress import OnProgress, ignore
from errata.stats.tables import Tables, fill
from errata.types import AskOptions, Probe, Request

ANSWER = AskOptions(max_new_tokens=16)
"""How canaries and statements are asked: the longest answer that is compared."""
SCORED = AskOptions(generate=False)
"""How beginnings of neutral texts are read: for the next token alone."""
SHOWN = 20
"""Most prompts of a kind whose answers are recorded where they changed."""
RECENT = 3
"""Number of sets of edits in place whose general measurements are held: an attempt's edits are the next one's."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of one edit; shares in [0, 1], None where there was nothing to ask."""

    answered: float | None = None
    """Requests of the edit that are answered with their target; None for an imported one, which has none."""
    earlier: float | None = None
    """Requests of earlier edits that were answered with their target and still are."""
    subject: float | None = None
    """Other statements about the subjects whose answer is the same."""
    canaries: float | None = None
    """Canary prompts whose answer is the same."""
    divergence: float | None = None
    """Mean Kullback-Leibler divergence of the next token behind canaries and beginnings of neutral texts, in nats."""
    perplexity: float | None = None
    """Of neutral text, as a multiple of that before the edit."""
    total_perplexity: float | None = None
    """The same as a multiple of the unedited model's."""
    norm: float | None = None
    """Largest norm of a weight's change by all edits together over the weight's own; None if no weight changes."""
    finite: bool = True
    """Whether all numbers of the edit and of the edited model's outputs are finite."""
    changed: tuple[Mapping[str, str], ...] = ()
    """Answers that are not as they should be: kind, prompt, before, after."""

    def to_dict(self) -> dict[str, Any]:
        """Return the measurement as plain data; what is not finite as text."""
        return {name: _plain(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Verdict:
    """Whether an edit may be applied."""

    measured: Measurement
    bounds: Bounds
    failures: tuple[str, ...]
    """What was out of bounds, one sentence each; empty if nothing was."""

    @property
    def passed(self) -> bool:
        """Whether everything is within its bounds."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return {
            "passed": self.passed, "failures": list(self.failures), "measured": self.measured.to_dict(),
            "bounds": asdict(self.bounds),
        }  # fmt: skip


def judge(measured: Measurement, bounds: Bounds) -> Verdict:
    """Compare a measurement with bounds; what was not measured is in bounds."""
    failures = [] if measured.finite else ["numbers of the edit or of the edited model are not finite"]
    for name, what in (*LEAST.items(), *MOST.items()):
        value, bound = getattr(measured, name), getattr(bounds, name)
        if value is None:
            continue
        # written so that what is not a number fails
        if not (value >= bound if name in LEAST else value <= bound):
            word = "at least" if name in LEAST else "at most"
            failures.append(f"{what}: {value:.4g}, {word} {bound:.4g}")
    return Verdict(measured, bounds, tuple(failures))


@dataclass(frozen=True)
class _General:
    """What is measured of a host whatever the edit is about."""

    answers: list[str]
    """To the canaries."""
    spread: Tensor
    """Log-probabilities of the next token behind canaries and openings ``[prompts, vocab]``."""
    perplexity: float


@dataclass
class Guard:
    """Measures edits on a host; texts and prompts are chosen once, on the unedited host."""

    host: Host
    settings: GuardSettings
    texts: tuple[str, ...] = ()
    """Neutral texts."""
    openings: tuple[str, ...] = ()
    """Beginnings of neutral texts."""
    canaries: tuple[str, ...] = ()
    """Prompts whose answers are compared."""
    tables: Tables | None = None
    """What the host says about itself; None for one that does not continue texts."""
    base_perplexity: float = math.nan
    on_progress: OnProgress = field(default=ignore, repr=False)
    _recent: dict[tuple[Any, ...], _General] = field(default_factory=dict[Any, _General], repr=False)

    @classmethod
    def of(cls, host: Host, settings: GuardSettings, *, on_progress: OnProgress = ignore) -> Guard:
        """Return the guard of an unedited host: neutral texts of its corpus, prompts of those texts and its tables."""
        work = workspace(host, seed=0, corpus=settings.corpus or None, on_progress=on_progress)
        neutral = runner.held_out if settings.corpus else runner.neutral_texts
        texts = tuple(neutral(host, work))[: settings.texts]
        tables = work.tables(host) if host.continues else None
        drawn = () if tables is None else draw_statements(tables, settings.prompts)
        guard = cls(
            host, settings, texts, tuple(health.open_prompts(texts)),
            tuple(dict.fromkeys((*settings.canaries, *drawn))), tables, on_progress=on_progress,
        )  # fmt: skip
        guard.base_perplexity = guard.perplexity()
        return guard

    def perplexity(self) -> float:
        """Return the perplexity of the neutral texts with what is in place."""
        rows = likelihood.rolling(
            self.host, self.texts, on_rows=lambda now, total: self.on_progress("perplexity", now, total)
        )
        return perplexity.of_texts([torch.tensor(row) for row in rows])

    def canaries_beside(self, subjects: Collection[str]) -> tuple[str, ...]:
        """Return the canaries that are not about some subjects; those of the settings whatever they are about."""
        own = self.settings.canaries
        return tuple(c for c in self.canaries if c in own or not any(name in c for name in subjects))

    def before(self, requests: Sequence[Request], earlier: Sequence[Request]) -> Before:
        """Measure the host as it is, before an edit of some requests; ``earlier``: those of edits in place."""
        statements = self._statements(requests)
        canaries = self.canaries_beside({request.subject for request in requests})
        general = self._general(canaries)
        return Before(
            tuple(requests), answer_requests(self.host, requests), tuple(earlier),
            answer_requests(self.host, earlier) if earlier else [], statements, self._answers(statements),
            canaries, general.answers, general.spread, general.perplexity,
        )  # fmt: skip

    def measure(self, before: Before, edit: Edit, active: Sequence[Edit]) -> Measurement:
        """Measure the host with an edit in place, beside those that were ``active`` before.

        ``before``: what :meth:`before` returned for the edit's requests.
        """
        if not all(
            bool(torch.isfinite(part).all()) for part in edit.parts().values() if part.is_floating_point()
        ):
            return Measurement(finite=False)
        own = compare_answers(before.requests, before.answers, answer_requests(self.host, before.requests))
        changed = [_changed("request", one.request.text, one.before, one.after) for one in own.missed]
        held = compare_answers(before.earlier, before.earlier_answers, before.earlier_answers)
        still = compare_answers(
            before.earlier, before.earlier_answers,
            answer_requests(self.host, before.earlier) if before.earlier else [],
        )  # fmt: skip
        pairs = [b for a, b in zip(held.requests, still.requests, strict=True) if a.answered]
        changed += [_changed("earlier", p.request.text, p.before, p.after) for p in pairs if not p.answered]
        subject = self._answers(before.statements)
        changed += _differences("subject", before.statements, before.statement_answers, subject)
        general = self._general(before.canaries)
        spread, ppl = general.spread, general.perplexity
        changed += _differences("canary", before.canaries, before.canary_answers, general.answers)
        return Measurement(
            answered=own.answered / len(own.requests) if own.requests else None,
            earlier=sum(p.answered for p in pairs) / len(pairs) if pairs else None,
            subject=_same(before.statement_answers, subject),
            canaries=_same(before.canary_answers, general.answers),
            divergence=_divergence(before.spread, spread),
            perplexity=ppl / before.perplexity, total_perplexity=ppl / self.base_perplexity,
            norm=largest_norm(self.host, [*active, edit]),
            finite=math.isfinite(ppl) and bool(torch.isfinite(spread.exp()).all()),
            changed=tuple(changed[: 4 * SHOWN]),
        )  # fmt: skip

    def _statements(self, requests: Sequence[Request]) -> tuple[str, ...]:
        """Return other statements about the subjects, which the host completes: from its tables, else sampled."""
        some = spread_over(requests, self.settings.subjects)
        if self.tables is None or not self.settings.statements:
            return ()
        prompts: list[str] = []
        for number, request in enumerate(some):
            self.on_progress("statements", number, len(some))
            text = own_text(self.host, request, self.tables, OwnCounts(anchors=self.settings.statements))
            prompts += [one.text for one in text.anchors]
        return tuple(dict.fromkeys(prompts))

    def _answers(self, prompts: Sequence[str]) -> list[str]:
        probes = [Probe("same_subject", prompt, (), ()) for prompt in prompts]
        return [matching.first_answer(one.text) for one in observe(self.host, probes, ANSWER)]

    def _general(self, canaries: Sequence[str]) -> _General:
        """Measure the host with what is in place; what was measured of the same edits shortly before is taken again."""
        host = self.host
        key = (
            host.fingerprint,
            host.placed,
            host.prompt_format,
            tuple(canaries),
            self.openings,
            self.texts,
        )
        found = self._recent.pop(key, None)
        if found is None:
            found = _General(*self._ask(canaries), self.perplexity())
        self._recent[key] = found
        while len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        return found

    def _ask(self, canaries: Sequence[str]) -> tuple[list[str], Tensor]:
        """Return the answers to canaries, and the next token's log-probabilities behind them and the openings.

        Float32 ``[prompts, vocab]``.
        """
        asked, opened = (
            observe(self.host, [Probe("neighbourhood", prompt, (), ()) for prompt in prompts], options)
            for prompts, options in ((canaries, ANSWER), (self.openings, SCORED))
        )
        seen = [one.next_logprobs for one in (*asked, *opened)]
        answers = [matching.first_answer(one.text) for one in asked]
        return answers, torch.stack(seen) if seen else torch.zeros(0, 1)


@dataclass(frozen=True)
class Before:
    """What was measured before an edit."""

    requests: tuple[Request, ...]
    answers: list[str]
    earlier: tuple[Request, ...]
    earlier_answers: list[str]
    statements: tuple[str, ...]
    statement_answers: list[str]
    canaries: tuple[str, ...]
    canary_answers: list[str]
    spread: Tensor
    """Log-probabilities of the next token behind canaries and openings ``[prompts, vocab]``."""
    perplexity: float


def draw_statements(tables: Tables, count: int) -> list[str]:
    """Return prompts about names of a host's tables, drawn evenly over their types and templates; always the same."""
    draw = random.Random("errata-canaries")
    types = [table for table in tables.types if table.names and table.templates]
    prompts: dict[str, None] = {}
    for turn in range(20 * count if types else 0):  # a drawn prompt may be there already
        table = types[turn % len(types)]
        prompts[fill(draw.choice(table.templates), draw.choice(table.names))] = None
        if len(prompts) == count:
            break
    return list(prompts)


def spread_over(requests: Sequence[Request], most: int) -> list[Request]:
    """Return at most so many requests of different subjects, evenly from the first to the last."""
    one_each = list({request.subject: request for request in requests}.values())
    if len(one_each) <= most:
        return one_each
    return [one_each[i * len(one_each) // most] for i in range(most)]


def largest_norm(host: Host, edits: Sequence[Edit]) -> float | None:
    """Return the largest ||D|| / ||W|| of a weight, D being all edits' change together; None without weight edits.

    W is as it was without edits. Weights that are stored packed are left out.
    """
    deltas: dict[str, Any] = {}
    for edit in edits:
        for name, delta in edit.deltas.items() if isinstance(edit, WeightEdit) else ():
            deltas[name] = add_deltas(deltas[name], delta) if name in deltas else delta
    ratios: list[float] = []
    for name, delta in deltas.items():
        weight = host.overlays[name].base if name in host.overlays else health.stored_weight(host, name)
        if weight is None:
            continue
        size = float(weight.double().norm())
        ratios.append(delta_norm(delta) / size if size else math.inf)
    return max(ratios, default=None)


def _changed(kind: str, prompt: str, before: str, after: str) -> dict[str, str]:
    return {"kind": kind, "prompt": prompt, "before": before, "after": after}


def _differences(
    kind: str, prompts: Sequence[str], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    rows = zip(prompts, before, after, strict=True)
    return [_changed(kind, prompt, old, new) for prompt, old, new in rows if old != new][:SHOWN]


def _same(before: Sequence[str], after: Sequence[str]) -> float | None:
    if not before:
        return None
    return sum(a == b for a, b in zip(before, after, strict=True)) / len(before)


def _divergence(before: Tensor, after: Tensor) -> float | None:
    """Return the mean KL(before || after) in nats of log-probabilities ``[prompts, vocab]``."""
    if not len(before):
        return None
    p = before.double().exp()
    # a probability of zero adds nothing, whatever the other one is
    terms = torch.where(p > 0, p * (before.double() - after.double()), 0.0)
    return float(terms.sum(-1).mean())


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
