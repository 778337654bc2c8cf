"""MQuAKE: chains, their edits and the demonstrations that go before their questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.data._base import Malformed, Record, Skip
from errata.data.sets import akew, mquake
from errata.errors import DataError

PROMPTS = Path(__file__).parents[3] / ".." / "shared" / "data" / "mquake_prompts"


def hop(question, answer, *aliases):
    return {"question": question, "cloze": "unused", "answer": answer, "answer_alias": list(aliases)}


def rewrite(prompt, subject, new, old, question):
    return {
        "prompt": prompt,
        "relation_id": "P27",
        "subject": subject,
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"},
        "question": question,
    }


CITIZEN = "Which country is Vela Orn a citizen of?"
CAPITAL = "What is the capital of Ruvia?"
RECORD = {
    "case_id": 7,
    "requested_rewrite": [
        rewrite("{} is a citizen of", "Vela Orn", "Ruvia", "Taland", CITIZEN),
        rewrite("The capital of {} is", "Ruvia", "Kesh", "Ormo", CAPITAL),
    ],
    "questions": ["Where is the government of Vela Orn?", "Her capital?", "Whose capital is it?"],
    "answer": "Sund",
    "answer_alias": ["Sund City"],
    "new_answer": "Kesh",
    "new_answer_alias": ["Kesh City", "Kesh"],
    "single_hops": [hop(CITIZEN, "Taland", "Kingdom of Taland"), hop("Capital of Taland?", "Sund")],
    "new_single_hops": [
        hop(CITIZEN, "Ruvia", "Republic of Ruvia"),
        hop(CAPITAL, "Kesh", "Kesh City"),
        hop("On which river is Kesh?", "Lum"),
    ],
    "orig": {},
}


def case(record=RECORD, variant="cf"):
    (made,) = mquake.DATASET.cases(Record(record, "record 1", 0), variant)
    return made


def probes(made, kind, form="short"):
    return [p for p in made.probes if p.kind == kind and p.form == form]


def test_a_case_holds_all_edits_of_its_chain():
    made = case()
    assert made.id == "mquake:7"
    assert [(r.text, r.target, r.target_old) for r in made.requests] == [
        ("Vela Orn is a citizen of", "Ruvia", "Taland"),
        ("The capital of Ruvia is", "Kesh", "Ormo"),
    ]
    assert [r.id for r in made.requests] == ["mquake:7.1 P27", "mquake:7.2 P27"]


def test_each_edit_is_asked_with_the_aliases_of_its_hop():
    efficacy, second = probes(case(), "efficacy")
    assert case().probes[0] == efficacy
    assert (efficacy.prompt, efficacy.rival) == ("Vela Orn is a citizen of", "Taland")
    assert efficacy.answers == ("Ruvia", "Republic of Ruvia")
    assert efficacy.before == ("Taland", "Kingdom of Taland")
    # the old chain does not pass through Ruvia, so of its old capital one spelling is known
    assert (second.answers, second.before) == (("Kesh", "Kesh City"), ("Ormo",))
    assert [p.prompt for p in probes(case(), "question")] == [CITIZEN, CAPITAL]


def test_phrasings_are_one_question_asked_directly_and_by_thoughts():
    direct, thought = probes(case(), "multi_hop"), probes(case(), "multi_hop", "thought")
    assert [p.prompt for p in direct] == RECORD["questions"]
    assert {(p.answers, p.before) for p in direct + thought} == {
        (("Kesh", "Kesh City"), ("Sund", "Sund City"))
    }
    assert {(p.group, p.need) for p in direct} == {("multi_hop", "any")}
    assert {(p.group, p.need) for p in thought} == {("thought", "any")}
    assert thought[1].prompt == "Question: Her capital?\nThoughts:"


def test_hops_must_all_be_right_and_the_unedited_one_keeps_its_answer():
    hops = probes(case(), "hop")
    assert {(p.group, p.need) for p in hops} == {("hops", "all")}
    assert [p.changes for p in hops] == [True, True, False]
    assert hops[2].answers == hops[2].before == ("Lum",)


def test_aliases_of_another_answer_to_the_same_question_are_not_taken():
    record = json.loads(json.dumps(RECORD))
    record["new_single_hops"][0]["answer"] = "Elsewhere"
    assert probes(case(record), "efficacy")[0].answers == ("Ruvia",)


def test_facts_count_edits_relations_and_hops():
    assert mquake.DATASET.facts([case(), case()]) == {
        "edits": 4,
        "relations": 1,
        "cases by edits": {2: 2},
        "cases by hops": {3: 2},
    }


@pytest.mark.parametrize("variant", mquake.DATASET.variants)
def test_variants_share_the_schema(variant):
    assert case(variant=variant) == case()


@pytest.mark.parametrize(
    ("field", "value", "kind", "says"),
    [
        ("requested_rewrite", [], Malformed, "requested_rewrite"),
        ("questions", [], Malformed, "questions"),
        ("new_answer", None, Malformed, "new_answer"),
        ("new_single_hops", "none", Malformed, "new_single_hops"),
    ],
)
def test_a_wrong_field_is_named(field, value, kind, says):
    with pytest.raises(kind, match=says):
        case({**RECORD, field: value})


def test_a_subject_that_is_not_in_the_prompt_is_skipped():
    record = {**RECORD, "requested_rewrite": [rewrite("He lives in", "Vela Orn", "Ruvia", "Taland", CITIZEN)]}
    with pytest.raises(Skip, match="does not occur in prompt"):
        case(record)


def test_it_is_told_from_records_with_passages():
    assert mquake.DATASET.fits(RECORD) and not akew.DATASET.fits(RECORD)
    for other in ({}, [], "text", {"requested_rewrite": {}}, {**RECORD, "requested_rewrite": []}):
        assert not mquake.DATASET.fits(other)


COT = "Question: Which sea?\nThoughts: It lies in the north.\nAnswer: North Sea"
LINES = "Q: Which sea? A: North Sea\nQ: Which hill? A: Low Hill\n"


def test_demonstrations_of_thoughts_go_before_thoughts_alone():
    (made,) = mquake.with_demonstrations([case()], COT + "\n")
    assert probes(made, "multi_hop") == probes(case(), "multi_hop")
    assert probes(made, "multi_hop", "thought")[1].prompt == f"{COT}\n\nQuestion: Her capital?\nThoughts:"
    assert made.requests == case().requests


def test_demonstrations_of_answers_go_before_direct_questions_alone():
    (made,) = mquake.with_demonstrations([case()], LINES)
    assert probes(made, "multi_hop", "thought") == probes(case(), "multi_hop", "thought")
    assert probes(made, "multi_hop")[1].prompt == LINES + "Q: Her capital? A:"


def test_other_texts_and_other_cases_are_refused():
    with pytest.raises(DataError, match="no demonstrations"):
        mquake.with_demonstrations([case()], "Question: Which sea?\nSubquestion: Which coast?")
    with pytest.raises(DataError, match="no case"):
        mquake.with_demonstrations([], COT)


@pytest.mark.parametrize(
    ("name", "form", "first", "last"),
    [
        ("multihop-prompts.txt", "short", "Q: ", "Q: Her capital? A:"),
        ("multihop-cot-prompts.txt", "thought", "Question: ", "Question: Her capital?\nThoughts:"),
    ],
)
def test_the_datasets_own_demonstrations(name, form, first, last):
    if not (PROMPTS / name).is_file():
        pytest.skip("the shared data is not beside the checkout")
    text = (PROMPTS / name).read_text(encoding="utf-8")
    (made,) = mquake.with_demonstrations([case()], text)
    prompt = probes(made, "multi_hop", form)[1].prompt
    assert prompt.startswith(first) and prompt.endswith(last)
    # the question is asked in the format of the demonstrations, once more than they do
    assert prompt.count(f"\n{first}") == ("\n" + text).count(f"\n{first}")


def test_the_prompt_of_mello_is_no_such_demonstration():
    path = PROMPTS / "MeLLo-prompt.txt"
    if not path.is_file():
        pytest.skip("the shared data is not beside the checkout")
    with pytest.raises(DataError, match="no demonstrations"):
        mquake.with_demonstrations([case()], path.read_text(encoding="utf-8"))
