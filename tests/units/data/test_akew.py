"""AKEW: one record under its three settings."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from errata.data._base import Malformed, Record
from errata.data.sets import akew, mquake

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data" / "akew_mquake_cf.json"

PASSAGE = "Vela Orn, born in Sund, holds the citizenship of Ruvia and lives on a boat."
RECORD = {
    "case_id": 3,
    "requested_rewrite": [
        {
            "prompt": "{} is a citizen of",
            "relation_id": "P27",
            "target_new": {"str": "Ruvia"},
            "target_true": {"str": "Taland"},
            "subject": "Vela Orn",
            "question": "Which country is Vela Orn a citizen of?",
            "fact_new": "Vela Orn is a citizen of Ruvia.",
            "fact_new_uns": PASSAGE,
            "unsfact_triplets_GPT": [
                {"subject": "Vela Orn", "prompt": "{} was born in", "target": "Sund"},
                {"subject": "Vela Orn", "prompt": "{} lives on", "target": "a boat"},
            ],
        }
    ],
    "questions": ["Where is her government?", "Her capital?", "Whose capital?"],
    "answer": "Sund",
    "answer_alias": [],
    "new_answer": "Kesh",
    "new_answer_alias": [],
    "single_hops": [
        {"question": "Which country is Vela Orn a citizen of?", "answer": "Taland", "answer_alias": []}
    ],
    "new_single_hops": [
        {"question": "Which country is Vela Orn a citizen of?", "answer": "Ruvia", "answer_alias": ["RU"]},
        {"question": "Capital of Ruvia?", "answer": "Kesh", "answer_alias": []},
    ],
}


def case(variant, record=RECORD):
    (made,) = akew.DATASET.cases(Record(record, "record 1", 0), variant)
    return made


def asked(made, kind):
    return [(p.prompt, p.answers, p.form) for p in made.probes if p.kind == kind]


def test_structured_is_the_fact_as_in_mquake():
    made = case("structured")
    (same,) = mquake.cases(Record(RECORD, "record 1", 0), "cf")
    assert (made.id, made.request.id) == ("akew:3", "akew:3.1 P27")
    assert (replace(made.request, id=same.request.id), made.probes) == (same.request, same.probes)
    assert f"{made.request.text} {made.request.target}." == RECORD["requested_rewrite"][0]["fact_new"]


def test_unstructured_answers_the_question_with_the_passage():
    made = case("unstructured")
    assert (made.request.text, made.request.subject) == (
        "Which country is Vela Orn a citizen of?",
        "Vela Orn",
    )
    assert made.request.target == PASSAGE
    assert made.probes[0].kind == "long"
    assert asked(made, "long") == [(made.request.text, (PASSAGE,), "long")]
    assert asked(made, "long_paraphrase") == [("Vela Orn is a citizen of", (PASSAGE,), "long")]
    assert asked(made, "sub_question") == [
        ("Vela Orn was born in", ("Sund",), "short"),
        ("Vela Orn lives on", ("a boat",), "short"),
    ]
    assert asked(made, "efficacy") == []


def test_triplets_are_requests_of_their_own():
    made = case("triplets")
    assert [(r.text, r.target, r.id) for r in made.requests] == [
        ("Vela Orn was born in", "Sund", "akew:3.1.1 P27"),
        ("Vela Orn lives on", "a boat", "akew:3.1.2 P27"),
    ]
    assert [answers for _, answers, _ in asked(made, "efficacy")] == [("Sund",), ("a boat",)]


@pytest.mark.parametrize("variant", akew.DATASET.variants)
def test_fact_and_chain_are_asked_under_every_setting(variant):
    made = case(variant)
    assert asked(made, "question") == [("Which country is Vela Orn a citizen of?", ("Ruvia", "RU"), "short")]
    assert Counter(p.group for p in made.probes if p.group) == {"multi_hop": 3, "thought": 3, "hops": 2}
    assert akew.DATASET.facts([made])["edits"] == 1


def test_a_passage_or_triplets_that_are_missing_are_named():
    for field, variant in (("fact_new_uns", "unstructured"), ("unsfact_triplets_GPT", "triplets")):
        record = json.loads(json.dumps(RECORD))
        record["requested_rewrite"][0][field] = None
        with pytest.raises(Malformed, match=field):
            case(variant, record)
        assert case("structured", record)


def test_it_is_told_from_records_without_passages():
    assert akew.DATASET.fits(RECORD) and not mquake.DATASET.fits(RECORD)


@pytest.mark.skipif(not SHARED.is_file(), reason="the shared data is not beside the checkout")
@pytest.mark.parametrize(
    ("variant", "requests", "longs", "parts"),
    [("structured", 436, 0, 0), ("unstructured", 436, 436, 2706), ("triplets", 2706, 0, 0)],
)
def test_the_real_file(variant, requests, longs, parts):
    rows = json.loads(SHARED.read_text(encoding="utf-8"))
    assert all(akew.DATASET.fits(row) for row in rows)
    made = [case(variant, row) for row in rows]
    assert akew.DATASET.facts(made) == {
        "edits": 436,
        "relations": 31,
        "cases by edits": {1: 277, 2: 72, 3: 5},
        "cases by hops": {2: 139, 3: 138, 4: 77},
    }
    kinds = Counter(p.kind for c in made for p in c.probes)
    assert (len(made), sum(len(c.requests) for c in made)) == (354, requests)
    assert (kinds["long"], kinds["sub_question"]) == (longs, parts)
    # three phrasings each, asked directly and by thoughts; every edited hop changes, no other one does
    assert kinds["multi_hop"] == 354 * 3 * 2
    assert sum(p.kind == "hop" and p.changes for c in made for p in c.probes) == 436
    assert len({c.id for c in made}) == 354
