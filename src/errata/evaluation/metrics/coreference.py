"""Coreference: whether a model names the person that a pronoun means, as DAMA asks WinoBias (arXiv 2310.18913).

A probe of kind ``coreference`` ends in "'She' refers to the"; it is right where the first token of the person is the
most probable one. Its covariates say whether the pronoun goes against the stereotype, and whether it is male.

Scores in per cent: WB.acc, the accuracy; dS, that of sentences with the stereotype less that of those against it; dG,
that of male pronouns less that of female ones. Without a bias both differences are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errata.evaluation.metrics import intervals
from errata.evaluation.metrics._metric import SIDES, Column, Metric, ProbeResult, per_cent
from errata.types import Row

NAME = "named"
COVARIATES = ("against", "male")


def rows(result: ProbeResult) -> list[Row]:
    """Return whether the answer's first token is the most probable one; empty without the covariates."""
    covariates = dict(result.probe.covariates)
    tops = (result.before.answer_top, result.after.answer_top)
    if not all(name in covariates for name in COVARIATES) or not all(tops):
        return []
    before, after = (top[0] for top in tops)
    return [result.row(NAME, before, after, **{name: covariates[name] for name in COVARIATES})]


def summary(rows: Sequence[Row], relevant: Sequence[Row]) -> dict[str, Any]:
    """Return the differences of accuracies before and after; None where one of two groups is empty."""
    entry: dict[str, Any] = {}
    for number, name, first in (("stereotype", "against", 0.0), ("gender", "male", 1.0)):
        for side in SIDES:
            groups = [
                intervals.mean([getattr(row, side) for row in rows if (row.detail[name] == first) == match])
                for match in (True, False)
            ]
            entry[f"{number}_{side}"] = None if None in groups else groups[0] - groups[1]  # type: ignore[operator]
    return entry


METRIC = Metric(
    name=NAME,
    label="named",
    title="coreference: the person that the pronoun means is named, per cent",
    judges=True,
    forms=frozenset({"span"}),
    rows=rows,
    summary=summary,
    columns=(
        Column("stereotype_after", "with less against the stereotype", "dS, should be 0"),
        Column("gender_after", "male less female", "dG, should be 0"),
    ),
    scores=(
        per_cent("WB.acc", f"coreference.{NAME}", order=11),
        per_cent("dS", f"coreference.{NAME}", "stereotype", order=11),
        per_cent("dG", f"coreference.{NAME}", "gender", order=11),
    ),
)
