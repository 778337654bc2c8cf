"""20Q and PEP3k: statements whose judgement is flipped."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from errata.data._base import Malformed, Record, Skip
from errata.data.reading import read
from errata.data.sets import commonsense


def statement(**fields):
    value = {
        "prompt": "a person reads clocks",
        "label": 1,
        "subject": "person",
        "verb": "reads",
        "object": "clocks",
        "neg": None,
    }
    return value | fields


def probed(**fields):
    more = {
        "id": 17,
        "label": " False",
        "predicted_label": "True",
        "affected_paraphrase": ["a human reads clocks"],
        "affected_neighborhood_subject": ["a child reads clocks"],
        "affected_neighborhood_verb": ["a person studies clocks"],
        "affected_neighborhood_object": ["a person reads watches"],
        "affected_reasoning": ["clocks have no words"],
        "unaffected_neighborhood_subject": ["a stone reads clocks"],
        "unaffected_neighborhood_object": ["a person reads books"],
    }
    return statement(**(more | fields))


def made(value, variant="pep3k"):
    assert commonsense.fits(value)
    (case,) = commonsense.cases(Record(value, "record 3", 2), variant)
    return case


@pytest.mark.parametrize(
    ("label", "target", "old"),
    [(1, "True", "False"), (0, "False", "True"), (" True", "True", "False"), ("False", "False", "True")],
)
def test_an_edit_flips_the_judgement(label, target, old):
    case = made(statement(label=label), "20q")
    assert case.id == "commonsense:20q/2"
    assert case.request.text == "a person reads clocks:"
    assert (case.request.target, case.request.target_old) == (target, old)
    (probe,) = case.probes
    assert (probe.form, probe.choices, probe.rival) == ("choice", ("True", "False"), old)
    assert (probe.answers, probe.before) == ((target,), (old,))


@pytest.mark.parametrize("label", [2, None, "maybe", 0.5])
def test_another_label_is_malformed(label):
    with pytest.raises(Malformed, match="label: expected 1, 0, True or False"):
        made(statement(label=label))


def test_the_probe_set_says_what_follows_and_what_does_not():
    case = made(probed())
    assert case.id == "commonsense:pep3k/17"
    assert Counter(probe.kind for probe in case.probes) == {
        "efficacy": 1,
        "paraphrase": 1,
        "affected_subject": 1,
        "affected_verb": 1,
        "affected_object": 1,
        "logical": 1,
        "neighbourhood": 2,
        "same_subject": 2,
    }
    answers = {probe.kind: probe.answers for probe in case.probes if probe.changes}
    assert answers.pop("logical") == ("True",)
    assert set(answers.values()) == {("False",)}


def test_what_must_not_change_counts_once_whatever_the_model_said_before():
    kept = [probe for probe in made(probed()).probes if probe.kind == "neighbourhood"]
    assert not any(probe.changes for probe in kept)
    for said in commonsense.JUDGEMENTS:
        right_before = [probe for probe in kept if said in probe.before]
        assert len(right_before) == 1 and right_before[0].answers == (said,)
        assert right_before[0].rival != said


def test_the_subject_is_a_word_of_its_own():
    case = made(statement(prompt="personal clocks tell a person time"))
    assert case.request.template[0] == "personal clocks tell a "


def test_a_statement_without_its_parts_is_left_out():
    bare = {"prompt": "a person reads clocks", "label": 0}
    assert commonsense.fits(bare)
    with pytest.raises(Skip, match="not annotated"):
        list(commonsense.cases(Record(bare, "record 1", 0), "20q"))


def test_a_file_is_told_by_its_fields(tmp_path):
    path = tmp_path / "edit_set.json"
    path.write_text(json.dumps([statement(), probed(id=18)]), encoding="utf-8")
    check = read(path).check
    assert (check.dataset, check.cases, check.facts) == (
        "commonsense",
        2,
        {"rows by label": {"False": 1, "True": 1}},
    )
