"""Teacher forcing: whether each token of the answer is the argmax, given the true tokens before it.

Scores: share of tokens in per cent, as in the zsRE code of ROME and in EasyEdit (Rel, Gen, Loc, Port). Loc compares
with the gold answer, as in ROME and UltraEdit; EasyEdit's own Loc compares the argmax tokens before and after.
Rel.exact and Gen.exact: all tokens (MEND's edit success).
"""

from __future__ import annotations

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

NAME = "teacher_forced"

PORTABILITY = ("one_hop", "inverse", "alias", "logical")
"""Kinds that EasyEdit averages as portability."""


def rows(result: ProbeResult) -> list[Row]:
    """Score the teacher-forced answer: whether all tokens are right, and the share of them."""
    old, new = result.before.answer_top, result.after.answer_top
    return [
        result.row(
            NAME,
            probability.exact(old),
            probability.exact(new),
            tokens_before=probability.token_accuracy(old),
            tokens_after=probability.token_accuracy(new),
            changes=result.probe.changes,
        )
    ]


def portability(summary: Summary, side: Side) -> float | None:
    """Return the mean share of tokens over the portability kinds that were evaluated, in per cent."""
    shares = [
        share
        for kind in PORTABILITY
        if (share := number_of(summary, f"{kind}.{NAME}", "tokens", side)) is not None
    ]
    return 100 * sum(shares) / len(shares) if shares else None


METRIC = Metric(
    name=NAME,
    label="teacher-forced",
    title="legacy, teacher-forced: every answer token is the argmax given the true tokens before it, per cent",
    judges=True,
    forms=frozenset({"short"}),
    rows=rows,
    summary=side_averages("tokens"),
    scores=(
        per_cent("Rel", "efficacy.teacher_forced", "tokens", order=1),
        per_cent("Gen", "paraphrase.teacher_forced", "tokens", order=1),
        per_cent("Loc", "locality.teacher_forced", "tokens", order=1),
        per_cent("Rel.exact", "efficacy.teacher_forced", order=1),
        per_cent("Gen.exact", "paraphrase.teacher_forced", order=1),
        PaperScore("Port", portability, order=7),
    ),
    order=1,
)
