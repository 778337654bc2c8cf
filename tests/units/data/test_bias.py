"""Professions with gender scores, and DAMA's training and test sentences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.data._base import Malformed, Record, Skip
from errata.data.reading import read
from errata.data.sets import dama, professions

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")


def case_of(dataset, value, variant=""):
    assert dataset.fits(value)
    (case,) = dataset.cases(Record(value, "record 1", 0), variant)
    return case


def training(prompt="The clock keeper ate because", pronoun="she"):
    value = {"prompt": prompt, "subject": "The clock keeper", "target_new": {"str": pronoun}}
    return value | {"gender_score": 0.4}


@pytest.mark.parametrize(
    ("row", "target", "right"),
    [
        (["clock_keeper", 0.0, 0.4], "she", ("he", "she")),
        (["clock_keeper", 0.1, -0.4], "he", ("he", "she")),
        (["clock_keeper", 0.25, 0.0], "she", ("he", "she")),
        (["countess", -0.9, 0.2], "she", ("she",)),
        (["count", 0.8, 0.7], "he", ("he",)),
    ],
)
def test_a_profession_is_taught_against_its_stereotype_unless_the_word_decides(row, target, right):
    case = case_of(professions, row)
    assert case.request.target == target
    first, *asked = case.probes
    assert (first.kind, first.answers, first.rival) == (
        "efficacy",
        (target,),
        {"he": "she", "she": "he"}[target],
    )
    assert len(asked) == 11
    assert {(probe.kind, probe.form, probe.choices, probe.answers) for probe in asked} == {
        ("bias", "choice", ("he", "she"), right)
    }
    assert not any(probe.changes for probe in asked)


def test_names_are_spelled_as_in_text_and_group_their_sentences():
    case = case_of(professions, ["clock_keeper", 0.0, 0.4])
    assert case.request.text == "The clock keeper said that"
    assert case.request.subject == "The clock keeper"
    assert {probe.group for probe in case.probes[1:]} == {"clock keeper"}
    assert case.probes[-1].prompt == "The clock keeper stayed up because"


@pytest.mark.parametrize(
    "row", [["a", 0.0], ["a", "0", 0.0], [1, 0.0, 0.0], ["a", True, 0.0], ["a", 0.0, 1.5], {}]
)
def test_another_row_is_malformed(row):
    with pytest.raises(Malformed, match="record 1: expected"):
        list(professions.cases(Record(row, "record 1", 0), ""))


def test_scores_come_by_profession(tmp_path):
    path = tmp_path / "professions.json"
    path.write_text(json.dumps([["clock_keeper", 0.0, 0.4], ["countess", -0.9, 0.2]]), encoding="utf-8")
    scores = professions.scores(path)
    assert scores["clock keeper"] == professions.Score(0.0, 0.4)
    assert [score.pronoun for score in scores.values()] == [None, "she"]


def test_a_training_row_is_a_request_for_a_pronoun():
    case = case_of(dama, training(), "train")
    assert (case.id, case.request.text, case.request.target) == (
        "dama:0",
        "The clock keeper ate because",
        "she",
    )
    assert [(probe.kind, probe.form) for probe in case.probes] == [("efficacy", "choice"), ("bias", "choice")]
    assert case.probes[1].group == "clock keeper"
    with pytest.raises(Malformed, match="expected he or she"):
        case_of(dama, training(pronoun="they"), "train")


def test_a_test_sentence_asks_for_nothing_and_is_a_probe(tmp_path):
    text = "The clock keeper went home because"
    assert dama.fits(text) and not dama.fits("The clock keeper sang")
    with pytest.raises(Skip, match="only measured"):
        list(dama.cases(Record(text, "record 1", 0), "test"))
    path = tmp_path / "test.json"
    path.write_text(json.dumps([text, "The countess said that"]), encoding="utf-8")
    scores = {"clock keeper": professions.Score(0.0, 0.4), "countess": professions.Score(-0.9, 0.2)}
    neutral, decided = dama.probes(path, scores)
    assert (neutral.prompt, neutral.group, neutral.answers) == (text, "clock keeper", ("he", "she"))
    assert decided.answers == ("she",)
    with pytest.raises(Malformed, match="record 2: expected a sentence about a profession with scores"):
        dama.probes(path, {"clock keeper": professions.Score(0.0, 0.4)})


@needs_files
def test_the_published_files_are_read():
    rows = read(SHARED / "professions.json").check
    assert (rows.dataset, rows.rows, rows.cases, rows.probes["bias"]) == ("professions", 320, 320, 320 * 11)
    train = read(SHARED / "dama_train.json")
    assert (train.check.dataset, train.check.rows, train.check.cases) == ("dama", 2409, 2409)
    assert train.check.facts["professions"] == 219
    test = read(f"dama/test@{SHARED / 'dama_test.json'}").check
    assert (test.rows, test.cases, len(test.skipped), len(test.malformed)) == (1111, 0, 1111, 0)


@needs_files
def test_the_published_files_agree_with_each_other():
    scores = professions.scores(SHARED / "professions.json")
    probes = dama.probes(SHARED / "dama_test.json", scores)
    assert len(probes) == 1111 and len({probe.group for probe in probes}) == 101
    train = read(SHARED / "dama_train.json").cases
    trained = {case.probes[1].group for case in train}
    assert trained <= scores.keys() and not trained & {probe.group for probe in probes}
    for case in train:
        score = scores[case.probes[1].group]
        assert score.pronoun is None
        assert case.request.target == ("he" if score.stereotype < 0 else "she")
