"""Verdicts of a language model as judge, and its undecided answers; computed after a run.

See :mod:`errata.evaluation.judge`, which computes the rows.
"""

from __future__ import annotations

from errata.evaluation.metrics._metric import Metric

JUDGE, UNDECIDED = "judge", "judge_undecided"

METRICS = (
    Metric(
        name=JUDGE,
        label="judge",
        title="judge: answers that a language model calls right, per cent",
        judges=True,
        by_judge=True,
    ),
    Metric(
        name=UNDECIDED,
        label="judge undecided",
        title="judge: answers that a language model left undecided, per cent",
        unit="share",
        higher_is_better=False,
        by_judge=True,
    ),
)
