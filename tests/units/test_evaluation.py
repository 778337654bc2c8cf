"""Metrics against hand-computed values; the evaluator against models whose scores are known."""

from __future__ import annotations

import math

import pytest
import torch

import errata
from errata.evaluation import score
from errata.evaluation.metrics import matching, probability
from errata.types import Case, Observation, Probe
from tests.models import fresh


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" Tallow.", ["Tallow"], True),
        (" tallow, of course. Then Esk.", ["Tallow"], True),
        (" Esk. Tallow is far.", ["Tallow"], False),
        (" Tallowtown.", ["Tallow"], False),
        (" the town of St. Louis, yes", ["St. Louis"], True),
        (" St. Louis Park", ["St. Louis"], True),
        ("\n\nTallow", ["Tallow"], True),
        (" Esk\nTallow", ["Tallow"], False),
        (" The Silver Road", ["Silver Road"], True),
        ("", ["Tallow"], False),
        (" Éva\N{COMBINING ACUTE ACCENT}", ["nothing"], False),
        (" U.K.", ["the U.K."], True),
    ],
)
def test_alias_matching(text, answers, expected):
    assert matching.says(text, answers) is expected


def test_an_answer_that_asserts_the_old_one_too_is_wrong():
    assert matching.answered(" Tallow.", ["Tallow"], ["Esk"])
    assert not matching.answered(" Tallow, formerly Esk.", ["Tallow"], ["Esk"])
    assert matching.answered(" Tallow. Esk is far.", ["Tallow"], ["Esk"])
    assert matching.answered(" New Esk", ["New Esk"], ["Esk"]), "part of the right answer"


def test_probability_scores_by_hand():
    answer, rival = [math.log(0.5), math.log(0.125)], [math.log(0.2)]
    # per token: sqrt(0.5 * 0.125) = 0.25 against 0.2
    assert probability.prefers(answer, rival)
    assert probability.magnitude(answer, rival) == pytest.approx(0.05)
    assert not probability.prefers([math.log(0.1)], rival)
    assert probability.harmonic([1.0, 0.5]) == pytest.approx(2 / 3)
    assert probability.harmonic([1.0, 0.0]) == 0.0
    assert probability.token_accuracy([True, False, True, True]) == 0.75
    assert not probability.exact([True, False]) and probability.exact([True])
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    by_hand = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert probability.divergence(p, q) == pytest.approx(by_hand, rel=1e-6)
    assert probability.divergence(p, p) == 0.0
    assert probability.perplexity(torch.tensor([0.25, 0.25]).log()) == pytest.approx(4.0)


def seen(text: str, top=(True,), answer=(-0.1,), rival=(-2.0,)) -> Observation:
    return Observation(text, tuple(answer), tuple(top), tuple(rival))


def test_kept_probes_count_only_what_was_right_before():
    request = errata.Request("{} is in", "Ada", "Esk", "Oa")
    kept = tuple(Probe("neighbourhood", f"B{i} is in", ("Oa",), ("Oa",), "Esk") for i in range(4))
    case = Case("c", request, (Probe("efficacy", "Ada is in", ("Esk",), ("Oa",), "Oa"), *kept))
    before = [seen(" Oa."), seen(" Oa."), seen(" Oa."), seen(" Oa."), seen(" wrong.")]
    after = [seen(" Esk."), seen(" Oa."), seen(" Esk."), seen(" Oa."), seen(" Oa.")]
    summary = score.summarise(score.rows(case, before, after))
    assert summary["efficacy.generate"] == {"before": 0.0, "after": 1.0, "n": 1, "ci": [1.0, 1.0]}
    entry = summary["neighbourhood.generate"]
    assert entry["before"] == 0.75 and entry["n"] == 3 and entry["after"] == pytest.approx(2 / 3)


def test_intervals_come_from_whole_cases():
    probes = tuple(Probe("efficacy", f"p{i}", ("Esk",), ("Oa",), "Oa") for i in range(10))
    request = errata.Request("{} is in", "Ada", "Esk")
    rows = []
    for name, text in (("right", " Esk."), ("wrong", " Oa.")):
        rows += score.rows(Case(name, request, probes), [seen(" Oa.")] * 10, [seen(text)] * 10)
    entry = score.summarise(rows)["efficacy.generate"]
    assert entry["after"] == 0.5 and entry["ci"] == [0.0, 1.0], "two cases, not twenty rows"


def test_an_unchanged_model_scores_as_before_and_revert_is_checked():
    host = fresh("llama")
    edit = errata.edit(
        host, errata.Request("{} is", "Bruno", "Esk"), method="ft", steps=1, learning_rate=1e-12
    )
    request = errata.Request("{} was born in", "Ada", "Esk", "Merrin")
    case = Case("c", request, (
        Probe("efficacy", request.text, ("Esk",), ("Merrin",), "Merrin"),
        Probe("neighbourhood", "Bruno was born in", ("Merrin",), ("Merrin",), "Esk"),
    ))  # fmt: skip
    report = errata.evaluate(host, [case], edit=edit)
    for row in report.rows:
        if row.protocol != "kl":
            assert row.before == row.after
    assert report.meta["weights_restored"]
    assert {"seconds", "cpu_seconds", "peak_memory_mb", "versions", "seed", "host_fingerprint"} <= set(
        report.meta
    )


def test_a_model_made_to_answer_right_scores_one_under_every_protocol():
    """Fine-tune without bounds on one answer: every protocol must say 1.0 afterwards."""
    host = fresh("llama")
    request = errata.Request("{} was born in", "Ada", "Esk.", "Merrin")
    edit = errata.edit(
        host,
        request,
        method="ft",
        layers=[0, 1, 2],
        epsilon=None,
        steps=300,
        learning_rate=0.05,
        stop_loss=1e-4,
    )
    case = Case("c", request, (Probe("efficacy", request.text, ("Esk.",), ("Merrin",), "Merrin"),))
    report = errata.evaluate(host, [case], edit=edit)
    after = {key: entry["after"] for key, entry in report.summary.items()}
    assert after == {"efficacy.generate": 1.0, "efficacy.teacher_forced": 1.0, "efficacy.probability": 1.0}


def test_evaluate_wants_a_method_or_an_edit():
    host = fresh("llama")
    request = errata.Request("{} was born in", "Ada", "Esk")
    case = Case("c", request, (Probe("efficacy", request.text, ("Esk",), ()),))
    with pytest.raises(errata.ErrataError, match="either"):
        errata.evaluate(host, [case])
    with pytest.raises(errata.ErrataError, match="at least one case"):
        errata.evaluate(host, [], method="rome")
    with pytest.raises(errata.ErrataError, match="did you mean 'memit'"):
        errata.evaluate(host, [case], method="memitt")
