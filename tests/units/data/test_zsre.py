"""zsRE in its forms and under its two conventions, on records of the schema that are made up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.data._base import Malformed, Record, Skip
from errata.data.reading import check, read
from errata.data.sets import REGISTRY

FOLDER = Path(__file__).parents[2] / "fixtures" / "data"
FLAT = FOLDER / "zsre_mend_eval.json"
KILT = FOLDER / "zsre_kilt.jsonl"
LIST = FOLDER / "zsre_dev_kilt.json"


def test_true_teaches_the_gold_answer_with_all_its_spellings():
    case = read(f"zsre/true@{FLAT}").cases[0]
    assert (case.request.target, case.request.target_old, case.request.subject) == (
        "Arvella", None, "Ada Morrow",
    )  # fmt: skip
    efficacy, paraphrase, locality = case.probes
    assert efficacy.prompt == "In which town was Ada Morrow born?"
    assert (efficacy.answers, efficacy.before, efficacy.rival) == (("Arvella", "Arvella Town"), (), None)
    assert (paraphrase.answers, paraphrase.before) == (efficacy.answers, ())
    assert locality.prompt == "nq question: who built the arvella bridge?"
    assert locality.answers == locality.before == ("the guild of masons",)


def test_alt_teaches_a_wrong_answer_in_place_of_the_gold_ones():
    case = read(f"zsre/alt@{FLAT}").cases[0]
    assert (case.request.target, case.request.target_old) == ("Corvane", "Arvella")
    for probe in case.probes[:2]:
        assert (probe.answers, probe.before, probe.rival) == (
            ("Corvane",), ("Arvella", "Arvella Town"), "Arvella",
        )  # fmt: skip
    assert case.probes[2].answers == case.probes[2].before == ("the guild of masons",)


def test_the_convention_is_in_the_name_and_the_default_is_true():
    assert check(FLAT).name == "zsre/true"
    found = check(f"zsre/alt@{FLAT}")
    assert found.name == "zsre/alt" and found.tag == f"zsre/alt@{found.sha256[:12]}"


def test_rows_left_out_are_listed_with_the_reason():
    true, alt = check(f"zsre/true@{FLAT}"), check(f"zsre/alt@{FLAT}")
    assert [fault.where for fault in true.skipped] == ["record 8"]
    assert "'H. Pembry' does not occur in prompt" in true.skipped[0].reason
    assert (true.subject_absent, true.cases) == (1, 19)
    assert [fault.where for fault in alt.skipped] == ["record 8", "record 10"]
    assert "among the gold ones" in alt.skipped[1].reason
    assert (alt.subject_absent, alt.cases) == (1, 18)


def test_kilt_lines_take_the_subject_where_it_is_given_and_else_the_question():
    """Every second record has ``meta.sub_surface``."""
    loaded = read(KILT)
    assert loaded.check.name == "zsre_kilt/true" and loaded.check.cases == 20
    named, unnamed = loaded.cases[0].request, loaded.cases[1].request
    assert (named.subject, named.text) == ("Ada Morrow", "In which town was Ada Morrow born?")
    assert unnamed.subject == unnamed.text == "In which town was Bren Castell born?"
    assert loaded.check.subject_is_prompt == 10
    assert loaded.cases[0].id == "zsre_kilt:100"
    assert [p.kind for p in loaded.cases[0].probes] == ["efficacy", "paraphrase", "paraphrase"]


def test_kilt_alternatives_are_wrong_answers():
    loaded = read(f"zsre_kilt/alt@{KILT}")
    assert loaded.cases[0].request.target == "Corvane"
    assert loaded.cases[0].probes[0].before == ("Arvella", "Arvella Town")
    assert [fault.where for fault in loaded.check.skipped] == ["line 4"]
    assert (
        "no wrong answer to use as the target: its 1 alternatives are gold" in loaded.check.skipped[0].reason
    )


def test_the_list_of_questions_has_no_wrong_answers():
    true, alt = read(LIST), check(f"zsre_kilt/alt@{LIST}")
    assert true.check.subject_is_prompt == true.check.cases == 20
    assert true.check.facts == {"type 0": 10, "type 1": 10}
    assert true.cases[4].id == "zsre_kilt:0-4-1"
    assert true.cases[4].probes[0].answers == ("Eastholt", "Eastholt Town")
    assert (alt.cases, len(alt.skipped)) == (0, 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answers": []}, "answers: expected at least one text"),
        ({"answers": 3}, "answers: expected texts, found int 3"),
        ({"src": ""}, "src: expected a text"),
        ({"loc_ans": None}, "loc_ans: expected texts, found nothing"),
    ],
)
def test_faults_of_flat_records(change, words):
    value = {**json.loads(FLAT.read_text(encoding="utf-8"))[0], **change}
    with pytest.raises(Malformed, match=words):
        list(REGISTRY.get("zsre").cases(Record(value, "record 1", 0), "true"))


@pytest.mark.parametrize(
    ("output", "words"), [("Arvella", "expected a list"), ([{"provenance": []}], "at least one answer")]
)
def test_faults_of_kilt_records(output, words):
    value = {"input": "Where?", "output": output, "filtered_rephrases": []}
    with pytest.raises(Malformed, match=words):
        list(REGISTRY.get("zsre_kilt").cases(Record(value, "line 1", 0), "true"))


def test_a_gold_answer_is_never_taught_as_wrong():
    value = {
        "input": "Where?",
        "output": ["Arvella"],
        "filtered_rephrases": [],
        "alternatives": ["Arvella", "Corvane"],
    }
    case = next(iter(REGISTRY.get("zsre_kilt").cases(Record(value, "line 1", 0), "alt")))
    assert case.request.target == "Corvane"
    with pytest.raises(Skip, match="no wrong answer"):
        list(REGISTRY.get("zsre_kilt").cases(Record({**value, "alternatives": []}, "line 1", 0), "alt"))
