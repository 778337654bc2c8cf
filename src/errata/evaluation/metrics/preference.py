"""Probability: whether a teacher-forced answer is more probable than its rival, as in ROME, CounterFact+ and EVOKE.

Scores in per cent: ES PS NS and their harmonic mean S, EM PM NM (ROME, arXiv 2202.05262); NS+ NM+, of neighbours after
the edit was stated (CounterFact+, arXiv 2305.17553); by kind, CAP the probability of the correct answer, DP that of the
edit's target where it is wrong, OAP that of the original answer, EOS and AMS the share of prompts where the correct
answer beats the one or the other (EVOKE, arXiv 2410.07819).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errata.evaluation.metrics import probability
from errata.evaluation.metrics._metric import (
    Metric,
    PaperScore,
    ProbeResult,
    Side,
    Summary,
    number_of,
    per_cent,
    side_averages,
)
from errata.types import Row

NAME = "probability"


def rows(result: ProbeResult) -> list[Row]:
    """Compare the teacher-forced answer with its rival, per token and summed; empty without a rival."""
    rival = result.probe.rival
    if rival is None:
        return []
    sides = {
        "before": (result.before.answer_logprobs, result.before.rival_logprobs),
        "after": (result.after.answer_logprobs, result.after.rival_logprobs),
    }
    detail: dict[str, Any] = {"rival": rival, "changes": result.probe.changes}
    for side, (answer, other) in sides.items():
        detail |= {
            f"magnitude_{side}": probability.magnitude(answer, other),
            f"summed_{side}": probability.prefers(answer, other, summed=True),
            f"answer_{side}": probability.per_token(answer),
            f"rival_{side}": probability.per_token(other),
        }
    before, after = (probability.prefers(answer, other) for answer, other in sides.values())
    return [result.row(NAME, before, after, **detail)]


def harmonic(summary: Summary, side: Side) -> float | None:
    """Return ROME's S: the harmonic mean of ES, PS and NS; None where one of them is missing."""
    shares = [
        number_of(summary, f"{kind}.{NAME}", "macro", side)
        for kind in ("efficacy", "paraphrase", "neighbourhood")
    ]
    percentages = [
        100 * share / 100 for share in shares if share is not None
    ]  # in per cent first, as papers do
    return probability.legacy_score(percentages) if len(percentages) == len(shares) else None


def _shares(names: Sequence[str], kinds: Sequence[str]) -> tuple[PaperScore, ...]:
    """Define EVOKE's scores by kind: probability of the answer, of its rival, and which is more probable."""
    return tuple(
        per_cent(f"{name}.{kind}", f"{kind}.{NAME}", number, order=5)
        for kind in kinds
        for name, number in zip(names, ("answer", "rival", "macro"), strict=True)
    )


METRIC = Metric(
    name=NAME,
    label="probability",
    title="legacy, probability: the answer is more probable than its rival, per cent",
    judges=True,
    forms=frozenset({"short"}),
    rows=rows,
    summary=side_averages("magnitude", "summed", "answer", "rival"),
    scores=(
        per_cent("ES", "efficacy.probability", lead=2),
        per_cent("PS", "paraphrase.probability", lead=3),
        per_cent("NS", "neighbourhood.probability", lead=4),
        per_cent("EM", "efficacy.probability", "magnitude"),
        per_cent("PM", "paraphrase.probability", "magnitude"),
        per_cent("NM", "neighbourhood.probability", "magnitude"),
        per_cent("NS+", "distracting.probability"),
        per_cent("NM+", "distracting.probability", "magnitude"),
        *_shares(("CAP", "DP", "EOS"), ("multi_hop", "distracting", "same_subject", "neighbourhood")),
        *_shares(("CAP", "OAP", "AMS"), ("efficacy", "paraphrase")),
        PaperScore("S", harmonic, order=6, lead=1, heading="legacy S"),
    ),
    order=2,
)
