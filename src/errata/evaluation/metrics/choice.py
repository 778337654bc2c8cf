"""Choice: whether the most probable of the labels offered is an accepted answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from errata.errors import DataError
from errata.evaluation.metrics import probability
from errata.evaluation.metrics._metric import Metric, ProbeResult, averages, both_sides, per_cent
from errata.types import Row

NAME = "choice"


def rows(result: ProbeResult) -> list[Row]:
    """Take the most probable choice, per token and summed; nothing where no choice was scored.

    Raises DataError where a side has log-probabilities of another number of choices.
    """
    probe, old, new = result.probe, result.before.choice_logprobs, result.after.choice_logprobs
    if not old and not new:
        return []
    for logprobs in (old, new):
        if len(logprobs) != len(probe.choices):
            raise DataError(
                f"case {result.case}, prompt {probe.prompt!r}: {len(probe.choices)} choices, log-probabilities "
                f"of {len(logprobs)}; observe both sides with the same probes"
            )
    detail: dict[str, Any] = {
        "answers": list(probe.answers), "choices": list(probe.choices), "changes": probe.changes,
    }  # fmt: skip
    right: dict[str, bool] = {}
    for side, logprobs in (("before", old), ("after", new)):
        chosen, summed = (
            None
            if (place := probability.most_probable(logprobs, summed=how)) is None
            else probe.choices[place]
            for how in (False, True)
        )
        right[side] = chosen in probe.answers
        detail |= {
            f"text_{side}": chosen or "",
            f"summed_{side}": summed in probe.answers,
            f"probabilities_{side}": [probability.per_token(choice) for choice in logprobs],
        }
    return [result.row(NAME, right["before"], right["after"], **detail)]


def summary(rows: Sequence[Row], counted: Sequence[Row]) -> dict[str, float | None]:
    """Return ``summed_before`` and ``summed_after``: right by summed log-probability."""
    return averages(rows, both_sides("summed"))


METRIC = Metric(
    name=NAME,
    label="choice",
    title="choice: the wanted answer the most probable of those offered, per cent",
    unit="share",
    higher_is_better=True,
    judges=True,
    forms=frozenset({"choice"}),
    rows=rows,
    summary=summary,
    scores=(
        per_cent("EI.acc", "entity.choice", order=4),
        per_cent("EI.spec", "entity_locality.choice", order=4),
    ),
)
