"""Teacher forcing: whether each token of the answer is the most probable one, the true tokens before it given.

Scores: share of tokens in per cent, as the zsRE code of ROME and EasyEdit have it (Rel, Gen, Loc, Port). Loc is held
against the gold answer, as by ROME and UltraEdit; EasyEdit's own Loc compares the most probable tokens before and
after. Rel.exact and Gen.exact: all tokens (MEND's edit success).
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.evaluation.metrics import probability
from errata.evaluation.metrics._metric import (
    Metric,
    PaperScore,
    ProbeResult,
    Side,
    Summary,
    averages,
    both_sides,
    number_of,
    per_cent,
)
from errata.types import Row

NAME = "teacher_forced"

PORTABILITY = ("one_hop", "inverse", "alias", "logical")
"""Kinds that EasyEdit averages as portability."""


def rows(result: ProbeResult) -> list[Row]:
    """Score the forced answer: all tokens right, and the share of them."""
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


def summary(rows: Sequence[Row], counted: Sequence[Row]) -> dict[str, float | None]:
    """Return ``tokens_before``, ``tokens_after``: the share of tokens, averaged as papers do."""
    return averages(rows, both_sides("tokens"))


def portability(summary: Summary, side: Side) -> float | None:
    """Return the mean share of tokens over the kinds of portability that were asked, in per cent."""
    shares = [
        share
        for kind in PORTABILITY
        if (share := number_of(summary, f"{kind}.{NAME}", "tokens", side)) is not None
    ]
    return 100 * sum(shares) / len(shares) if shares else None


METRIC = Metric(
    name=NAME,
    label="teacher-forced",
    title="legacy, teacher-forced: every token of the answer first, the true tokens given, per cent",
    unit="share",
    higher_is_better=True,
    judges=True,
    forms=frozenset({"short"}),
    rows=rows,
    summary=summary,
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
