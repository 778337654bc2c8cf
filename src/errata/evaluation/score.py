"""From observations to rows to a summary. Pure: nothing here runs a model or knows which method ran."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from errata.evaluation.metrics import matching, probability
from errata.types import Case, Observation, Probe, Row

PROTOCOLS = ("generate", "teacher_forced", "probability")
RESAMPLES = 2000


def rows(
    case: Case, before: Sequence[Observation], after: Sequence[Observation], *, checkpoint: int | None = None
) -> list[Row]:
    """Score every probe of a case under every protocol it allows.

    ``checkpoint``: how many edits were in place, for the rows' detail; None adds nothing.
    """
    moment = {} if checkpoint is None else {"checkpoint": checkpoint}
    made: list[Row] = []
    for probe, old, new in zip(case.probes, before, after, strict=True):
        made += _probe_rows(case.id, probe, old, new, moment)
    return made


def _probe_rows(
    case: str, probe: Probe, old: Observation, new: Observation, moment: Mapping[str, int]
) -> list[Row]:
    def row(protocol: str, b: float, a: float, **detail: Any) -> Row:
        return Row(case, probe.kind, protocol, probe.prompt, float(b), float(a), {**moment, **detail})

    wrong = [w for w in probe.before if w not in probe.answers] if probe.changes else []
    made = [
        row(
            "generate",
            matching.answered(old.text, probe.answers, wrong),
            matching.answered(new.text, probe.answers, wrong),
            text_before=matching.first_answer(old.text),
            text_after=matching.first_answer(new.text),
            answers=list(probe.answers),
            changes=probe.changes,
        ),
        row(
            "teacher_forced",
            probability.exact(old.answer_top),
            probability.exact(new.answer_top),
            tokens_before=probability.token_accuracy(old.answer_top),
            tokens_after=probability.token_accuracy(new.answer_top),
            changes=probe.changes,
        ),
    ]
    if probe.rival is not None:
        made.append(
            row(
                "probability",
                probability.prefers(old.answer_logprobs, old.rival_logprobs),
                probability.prefers(new.answer_logprobs, new.rival_logprobs),
                magnitude_before=probability.magnitude(old.answer_logprobs, old.rival_logprobs),
                magnitude_after=probability.magnitude(new.answer_logprobs, new.rival_logprobs),
                rival=probe.rival,
                changes=probe.changes,
            )
        )
    if old.next_logprobs is not None and new.next_logprobs is not None:
        made.append(row("kl", 0.0, probability.divergence(old.next_logprobs, new.next_logprobs)))
    return made


def summarise(table: Iterable[Row], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Average rows by kind and protocol, as ``{"<kind>.<protocol>": {before, after, n, ci}}``.

    For probes whose answer must not change, ``before`` is the share right before and ``after`` the
    share still right among those; ``n`` counts what ``after`` averages. ``ci`` is a 95 % bootstrap
    interval of ``after`` over cases.
    """
    groups: dict[str, list[Row]] = {}
    for row in table:
        groups.setdefault(f"{row.kind}.{row.protocol}", []).append(row)
    return {name: _entry(group, seed) for name, group in groups.items()}


def _entry(group: list[Row], seed: int) -> dict[str, Any]:
    kept = [row for row in group if row.detail.get("changes", True) or row.before > 0]
    by_case: dict[str, list[float]] = {}
    for row in kept:
        by_case.setdefault(row.case, []).append(row.after)
    after = _mean([row.after for row in kept])
    return {
        "before": _mean([row.before for row in group]),
        "after": after,
        "n": len(kept),
        "ci": _bootstrap(list(by_case.values()), seed) if kept else [None, None],
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _bootstrap(cases: list[list[float]], seed: int) -> list[float]:
    """Percentile interval of the mean over all values, drawing whole cases with replacement."""
    rng = random.Random(seed)
    sums = [(sum(values), len(values)) for values in cases]
    means = []
    for _ in range(RESAMPLES):
        drawn = rng.choices(sums, k=len(sums))
        means.append(sum(s for s, _ in drawn) / sum(n for _, n in drawn))
    means.sort()
    return [means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]]


def rome_scores(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return ROME's ES, PS, NS and their harmonic mean S, in per cent, from a summary."""
    keys = {"ES": "efficacy", "PS": "paraphrase", "NS": "neighbourhood"}
    found = {name: summary.get(f"{kind}.probability", {}).get("after") for name, kind in keys.items()}
    scores = {name: 100.0 * value for name, value in found.items() if value is not None}
    if len(scores) == len(keys):
        scores["S"] = probability.harmonic(list(scores.values()))
    return scores
