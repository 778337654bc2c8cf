"""ParaRel: wordings as paraphrases, facts with wordings as cases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.data._base import Malformed, Record, Skip
from errata.data.reading import read
from errata.data.sets import pararel
from errata.errors import DataError

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")

WORDINGS = ("[X] keeps time in [Y] .", "[Y] sets its clocks by [X]", "The clock  of [X] hangs in [Y].")


def lines(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.fixture
def patterns(tmp_path):
    folder = tmp_path / "patterns"
    folder.mkdir()
    lines(folder / "P1.jsonl", [{"pattern": text, "lemma": "keep", "tense": "present"} for text in WORDINGS])
    lines(folder / "P2.jsonl", [{"pattern": "[X] and [Y] are twins."}])
    return folder


@pytest.mark.parametrize(
    ("wording", "prompt"),
    [
        ("[X] keeps time in [Y] .", "{} keeps time in"),
        ("The clock  of [X] hangs in [Y].", "The clock of {} hangs in"),
        ("[Y] sets its clocks by [X]", None),
        ("[X] and [Y] are twins.", None),
        ("[X] keeps time", None),
    ],
)
def test_a_wording_asks_for_its_object_when_that_comes_last(wording, prompt):
    assert pararel.to_prompt(wording) == prompt


def test_paraphrases_come_by_relation(patterns, tmp_path):
    expected = ("{} keeps time in", "The clock of {} hangs in")
    assert pararel.paraphrases(patterns) == {"P1": expected, "P2": ()}
    assert pararel.paraphrases(patterns / "P1.jsonl") == {"P1": expected}
    assert pararel.wordings(patterns)["P1"] == WORDINGS
    relation = {"relation": "P1", "template": WORDINGS[0], "wrong": ["[X] never keeps time in [Y]."]}
    rows = lines(tmp_path / "relations.jsonl", [relation, {"relation": "P1", "template": WORDINGS[2]}])
    assert pararel.paraphrases(rows) == {"P1": expected}


def test_a_folder_of_nothing_and_a_wording_without_object_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no \*\.jsonl"):
        pararel.paraphrases(tmp_path)
    with pytest.raises(Malformed, match=r"line 1: expected one \[X\] and one \[Y\]"):
        pararel.paraphrases(lines(tmp_path / "P3.jsonl", [{"pattern": "[X] ticks"}]))


def test_facts_are_joined_with_the_wordings_of_their_relation(patterns, tmp_path):
    facts = lines(tmp_path / "P1.jsonl", [{"sub_label": "Ada Penn", "obj_label": "Lutz", "uuid": "u1"}])
    joined = lines(tmp_path / "joined.jsonl", pararel.facts_with_wordings(patterns, facts))
    loaded = read(joined)
    assert (loaded.check.dataset, loaded.check.facts) == ("pararel", {"facts by relation": {"P1": 1}})
    (case,) = loaded.cases
    assert case.id == "pararel:P1/u1"
    assert (case.request.prompt, case.request.subject, case.request.target) == (
        "{} keeps time in",
        "Ada Penn",
        "Lutz",
    )
    assert [(probe.kind, probe.prompt, probe.answers) for probe in case.probes] == [
        ("efficacy", "Ada Penn keeps time in", ("Lutz",)),
        ("paraphrase", "The clock of Ada Penn hangs in", ("Lutz",)),
    ]
    with pytest.raises(DataError, match="none of P9"):
        list(pararel.facts_with_wordings(patterns, lines(tmp_path / "P9.jsonl", [])))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"relation": "P1", "template": WORDINGS[0]}, "wordings without a fact"),
        ({"sub_label": "Ada Penn", "obj_label": "Lutz"}, "a fact without wordings"),
        (
            {"relation": "P1", "templates": [WORDINGS[1]], "sub_label": "Ada Penn", "obj_label": "Lutz"},
            "ends in its object",
        ),
    ],
)
def test_a_record_that_makes_no_case_says_why(value, reason):
    assert pararel.fits(value)
    with pytest.raises(Skip, match=reason):
        list(pararel.cases(Record(value, "record 1", 0), ""))


@needs_files
def test_the_published_relations_are_read():
    path = SHARED / "pararel_relations.jsonl"
    check = read(path).check
    assert (check.dataset, check.rows, check.cases, len(check.skipped)) == ("pararel", 46, 0, 46)
    assert len(check.malformed) == 0
    found = pararel.paraphrases(path)
    assert len(found) == 46
    assert found["P19"] == ("{} was born in",) and found["P36"] == ("The capital of {} is",)
    assert found["P1923"] == found["P190"] == ()
