"""EditEverything and UnKEBench: long answers to whole questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errata.data._base import Malformed, Record, Skip
from errata.data.sets import editeverything, unke

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"

POEM = {"id": 12, "question": " Write {} of rain. ", "answer": "Rain falls.\nIt stops.", "category": "poetry"}
TIDES = {
    "id": 4,
    "question": "Why are there tides?",
    "para_question": "What makes tides?",
    "answer": "The moon pulls the sea.",
    "sub_question": ["What pulls?", "What is pulled?"],
    "sub_answer": ["The moon does.", "The sea is."],
}


def case(dataset, record):
    (made,) = dataset.DATASET.cases(Record(record, "record 1", 0), "")
    return made


def shared(name):
    path = SHARED / name
    if not path.is_file():
        pytest.skip("the shared data is not beside the checkout")
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_whole_question_is_the_subject_even_with_braces():
    made = case(editeverything, POEM)
    assert made.id == "editeverything:12"
    assert made.request.text == made.request.subject == "Write {} of rain."
    assert made.request.span == (0, len("Write {} of rain."))
    assert made.request.target == POEM["answer"]
    (probe,) = made.probes
    assert (probe.kind, probe.form, probe.prompt) == ("long", "long", "Write {} of rain.")
    assert (probe.answers, probe.before) == ((POEM["answer"],), ())


def test_categories_words_and_repeats_are_counted():
    # answers of 4 and 2 words make a mean of 3 in poetry
    others = [{**POEM, "id": 13, "answer": "Dry day."}, {**POEM, "id": 14, "category": "news"}]
    made = [case(editeverything, record) for record in (POEM, *others)]
    assert editeverything.DATASET.facts(made) == {
        "rows by category": {"news": 1, "poetry": 2},
        "mean answer words": {"news": 4.0, "poetry": 3.0},
        "repeated questions": 2,
    }


def test_an_empty_answer_is_malformed():
    for dataset, record in ((editeverything, POEM), (unke, TIDES)):
        with pytest.raises(Malformed, match="answer"):
            case(dataset, {**record, "answer": " "})


def test_unke_asks_the_answer_twice_and_its_parts():
    made = case(unke, TIDES)
    assert made.id == "unke:4"
    assert [(p.kind, p.prompt, p.answers) for p in made.probes] == [
        ("long", "Why are there tides?", ("The moon pulls the sea.",)),
        ("long_paraphrase", "What makes tides?", ("The moon pulls the sea.",)),
        ("sub_question", "What pulls?", ("The moon does.",)),
        ("sub_question", "What is pulled?", ("The sea is.",)),
    ]
    assert all(p.form == "long" and p.before == () for p in made.probes)
    assert unke.DATASET.facts([made, made]) == {
        "sub-questions": 4,
        "rows by sub-questions": {2: 2},
        "mean answer words": 5.0,
    }


@pytest.mark.parametrize("answers", [["one"], ["one", ""], ["one", "two", "three"], None])
def test_sub_questions_without_their_answers_are_malformed(answers):
    with pytest.raises(Malformed, match="sub_answer"):
        case(unke, {**TIDES, "sub_answer": answers})


def test_parts_are_never_paired_with_the_answer_of_another():
    # an empty question and an empty answer leave as many of both, at different places
    record = {**TIDES, "sub_question": ["What pulls?", ""], "sub_answer": ["", "The sea is."]}
    with pytest.raises(Skip, match="sub_answer"):
        case(unke, record)


def test_they_are_told_apart():
    assert editeverything.DATASET.fits(POEM) and not unke.DATASET.fits(POEM)
    assert unke.DATASET.fits(TIDES) and not editeverything.DATASET.fits({**TIDES, "category": "x"})
    assert not unke.DATASET.fits([TIDES]) and not editeverything.DATASET.fits("poem")


def test_the_real_editeverything():
    rows = shared("editeverything.json")
    made = [case(editeverything, row) for row in rows]
    counted = editeverything.DATASET.facts(made)
    assert len(made) == len({c.id for c in made}) == 552
    assert counted["rows by category"] == {
        "biology": 92,
        "chemistry": 51,
        "code": 49,
        "math": 78,
        "news": 30,
        "physics": 221,
        "poetry": 31,
    }
    rounded = {name: round(words) for name, words in counted["mean answer words"].items()}
    assert rounded == {
        "biology": 196,
        "chemistry": 150,
        "code": 48,
        "math": 191,
        "news": 125,
        "physics": 197,
        "poetry": 78,
    }
    assert counted["repeated questions"] == 10


def test_the_real_unke():
    rows = shared("unke_v2.json")
    made = [case(unke, row) for row in rows]
    assert len(made) == len({c.id for c in made}) == 1000
    assert unke.DATASET.facts(made) == {
        "sub-questions": 4729,
        "rows by sub-questions": {4: 337, 5: 613, 6: 35, 7: 14, 8: 1},
        "mean answer words": 91.5,
    }
