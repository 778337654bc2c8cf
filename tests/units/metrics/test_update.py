"""Updated, retained or neither: by exact match, of answers that are to change."""

from __future__ import annotations

import pytest

from errata.evaluation.metrics import REGISTRY
from errata.evaluation.metrics._metric import ProbeResult
from errata.evaluation.metrics.summary import legacy_scores, summarise
from errata.evaluation.metrics.update import outcome
from errata.types import Observation, Probe

PROBE = Probe("efficacy", "Ada is in", ("Tallow", "Tallow Town"), ("Esk",))
TEXTS = {
    " Tallow.": "update", "the tallow town. Esk": "update", " Esk\n": "retain", " Esk and Tallow.": "other",
    "": "other", " Merrin.": "other",
}  # fmt: skip


def result(after: str, probe: Probe = PROBE, before: str = " Esk.") -> ProbeResult:
    old, new = (Observation(text, (), (), ()) for text in (before, after))
    return ProbeResult("c", probe, old, new)


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_one_of_three(text):
    assert outcome(text, PROBE.answers, PROBE.before) == TEXTS[text]


def test_the_shares_are_of_all_answers_that_are_to_change_and_add_up():
    metric = REGISTRY.find("update")
    table = [row for text in TEXTS for row in metric.rows(result(text))]
    scores = {side: legacy_scores(summarise(table), side=side) for side in ("before", "after")}
    assert scores["after"] == pytest.approx({"KU.update": 200 / 6, "KU.retain": 100 / 6, "KU.other": 50.0})
    assert scores["before"] == {"KU.update": 0.0, "KU.retain": 100.0, "KU.other": 0.0}
    entry = summarise(table)["efficacy.update"]
    assert entry["after"] + entry["retain_after"] + entry["other_after"] == pytest.approx(1)


def test_probes_without_an_old_answer_or_a_change_have_no_row():
    metric = REGISTRY.find("update")
    for probe in (
        Probe("neighbourhood", "Bo is in", ("Esk",), ("Esk",)), Probe("efficacy", "Ada is in", ("Tallow",), ()),
    ):  # fmt: skip
        assert metric.rows(result(" Tallow.", probe)) == []
