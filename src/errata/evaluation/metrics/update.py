"""Update: whether a generated answer is the new one, still the old one, or another.

Source: Si et al., "Prompting GPT-3 To Be Reliable", ICLR 2023, arXiv 2210.09150: the shares of answers that equal the
answer of an altered passage, that still equal the old answer, and of all others, by exact match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from errata.evaluation.metrics import matching
from errata.evaluation.metrics._metric import Column, Metric, ProbeResult, per_cent, side_averages
from errata.types import Row
from errata.types.kinds import EFFICACY

NAME = "update"
Outcome = Literal["update", "retain", "other"]


def outcome(text: str, new: Sequence[str], old: Sequence[str]) -> Outcome:
    """Return which answers the first sentence of a text equals; the new ones count first."""
    if matching.exact(text, new):
        return "update"
    return "retain" if matching.exact(text, old) else "other"


def rows(result: ProbeResult) -> list[Row]:
    """Sort both texts into the three outcomes; for the request itself alone, where its old answer is known."""
    probe = result.probe
    if probe.kind != EFFICACY or not (probe.changes and probe.answers and probe.before):
        return []
    before, after = (
        outcome(matching.first_answer(side.text), probe.answers, probe.before)
        for side in (result.before, result.after)
    )
    detail = {
        f"{name}_{side}": found == name
        for name in ("retain", "other")
        for side, found in (("before", before), ("after", after))
    }
    return [result.row(NAME, before == "update", after == "update", changes=True, **detail)]


METRIC = Metric(
    name=NAME,
    label="update",
    title="update: the generated answer is the new one and nothing else, per cent",
    judges=True,
    forms=frozenset({"short"}),
    needs_text=True,
    rows=rows,
    summary=side_averages("retain", "other"),
    columns=(
        Column("retain_after", "retain", "the old answer and nothing else", "changing"),
        Column("other_after", "other", "neither the new nor the old answer alone", "changing"),
    ),
    scores=(
        per_cent("KU.update", f"efficacy.{NAME}", order=5),
        per_cent("KU.retain", f"efficacy.{NAME}", "retain", order=5),
        per_cent("KU.other", f"efficacy.{NAME}", "other", order=5),
    ),
)
