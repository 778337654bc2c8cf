"""Choice: whether the most probable of the given choices is an accepted answer."""

from __future__ import annotations

from typing import Any

from errata.errors import DataError
from errata.evaluation.metrics import probability
from errata.evaluation.metrics._metric import Metric, ProbeResult, per_cent, side_averages
from errata.types import Row

NAME = "choice"


def rows(result: ProbeResult) -> list[Row]:
    """Score the most probable choice, per token and summed; empty where no choice was scored.

    Raises DataError where a side has log-probabilities for another number of choices.
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
        best, choice_by_sum = (
            None
            if (place := probability.most_probable(logprobs, summed=how)) is None
            else probe.choices[place]
            for how in (False, True)
        )
        right[side] = best in probe.answers
        detail |= {
            f"text_{side}": best or "",
            f"summed_{side}": choice_by_sum in probe.answers,
            f"probabilities_{side}": [probability.per_token(choice) for choice in logprobs],
        }
    return [result.row(NAME, right["before"], right["after"], **detail)]


METRIC = Metric(
    name=NAME,
    label="choice",
    title="choice: an accepted answer is the most probable choice, per cent",
    judges=True,
    forms=frozenset({"choice"}),
    rows=rows,
    summary=side_averages("summed"),
    scores=(
        per_cent("EI.acc", "entity.choice", order=4),
        per_cent("EI.spec", "entity_locality.choice", order=4),
    ),
)
