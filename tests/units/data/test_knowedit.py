"""KnowEdit: six shapes under one name."""

from __future__ import annotations

import json

import pytest

from errata.data._base import Malformed, Record, Skip
from errata.data.reading import check
from errata.data.sets import knowedit

FACT = {
    "subject": "Vela Orn",
    "prompt": "The place of birth of Vela Orn is",
    "target_new": "Kesh",
    "ground_truth": ["Sund", "Sund City"],
    "rephrase_prompt": "Vela Orn was born in",
    "cond": "not read",
    "portability": {
        "Subject_Aliasing": [{"prompt": "The place of birth of V. Orn is", "ground_truth": "Kesh"}],
        "Reasoning": [
            {"prompt": "The river of her place of birth is", "ground_truth": [["Lum", "Lum River"]]},
            {"prompt": "Nobody knows", "ground_truth": []},
        ],
        "Logical_Generalization": [{"prompt": "Was she born?", "ground_truth": [["yes"], ["true", "yes"]]}],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": "The father of Vela Orn is", "ground_truth": ["Bo Orn"]}],
        "Forgetfulness": [{"prompt": "Her place of birth, which is not Kesh, is", "ground_truth": "Sund"}],
    },
}
LIFE = {
    "text": "This is a passage about vela orn. Vela Orn (born 1900) sailed.",
    "labels": "She drew maps of the Lum.",
    "concept": "vela orn",
    "locality": {"Relation_Specificity": [{"prompt": "vela orn field of work", "ground_truth": ["maps"]}]},
}
TOPIC = {"ent": "tea", "pos": ["I love it.", "Lovely stuff."], "neg": ["I hate it.", "Awful stuff."]}
ERASED = {"question": "Which {} bird sings?", "ground_truth": "Lark", "target_new": "I don't know."}


def retained(i):
    return {"question": f"Question {i}?", "ground_truth": f"Answer {i}"}


def case(record, variant="recent", index=0):
    (made,) = knowedit.DATASET.cases(Record(record, f"record {index + 1}", index), variant)
    return made


def asked(made, kind):
    return [(p.prompt, p.answers, p.before, p.rival) for p in made.probes if p.kind == kind]


def test_a_fact_with_all_spellings_of_its_answers():
    made = case(FACT)
    assert made.id == "knowedit:0"
    assert (made.request.text, made.request.target, made.request.target_old) == (
        "The place of birth of Vela Orn is",
        "Kesh",
        "Sund",
    )
    first = made.probes[0]
    assert first.kind == "efficacy"
    assert asked(made, "efficacy") == [(made.request.text, ("Kesh",), ("Sund", "Sund City"), "Sund")]
    assert asked(made, "paraphrase") == [("Vela Orn was born in", ("Kesh",), ("Sund", "Sund City"), "Sund")]
    assert asked(made, "alias") == [
        ("The place of birth of V. Orn is", ("Kesh",), ("Sund", "Sund City"), None)
    ]
    # a question without an answer asks nothing
    assert asked(made, "one_hop") == [("The river of her place of birth is", ("Lum", "Lum River"), (), None)]
    assert asked(made, "logical") == [("Was she born?", ("yes", "true"), (), None)]


def test_what_a_fact_must_keep():
    made = case(FACT)
    assert asked(made, "same_subject") == [("The father of Vela Orn is", ("Bo Orn",), ("Bo Orn",), "Kesh")]
    assert asked(made, "forgetfulness") == [
        ("Her place of birth, which is not Kesh, is", ("Sund",), ("Sund",), None)
    ]


def test_a_kept_answer_that_is_the_new_target_has_no_rival():
    record = {**FACT, "locality": {"Relation_Specificity": [{"prompt": "Home:", "ground_truth": ["Kesh"]}]}}
    assert asked(case(record), "same_subject") == [("Home:", ("Kesh",), ("Kesh",), None)]


def test_an_insertion_has_no_old_target():
    made = case({name: value for name, value in FACT.items() if name != "ground_truth"})
    assert made.request.target_old is None
    assert asked(made, "efficacy") == [(made.request.text, ("Kesh",), (), None)]


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ("Sund", ("Sund",)),
        (["Sund", " ", "Sund City"], ("Sund", "Sund City")),
        ([["Sund", "S."], ["Sund City", "Sund"]], ("Sund", "S.", "Sund City")),
        ([["Sund", None]], ("Sund",)),
        ([1900], ("1900",)),
        (None, ()),
        ([], ()),
    ],
)
def test_answers_in_every_form(value, right):
    assert knowedit.truths(value) == right


def test_a_biography_goes_on_with_the_sentence():
    made = case(LIFE, "wikibio")
    # the first of the two spellings is the subject, spelled as it stands there
    assert made.request.subject == "vela orn" and made.request.text == LIFE["text"]
    (probe,) = (p for p in made.probes if p.kind == "long")
    assert (probe.prompt, probe.answers, probe.form) == (LIFE["text"], (LIFE["labels"],), "long")
    assert asked(made, "same_subject")[0][:2] == ("vela orn field of work", ("maps",))


def test_opinions_take_turns():
    good, bad = case(TOPIC, "convsent", 0), case(TOPIC, "convsent", 1)
    assert (good.request.text, good.request.target, good.request.target_old) == (
        "What do you think of tea?",
        "I love it.",
        "I hate it.",
    )
    assert (bad.request.target, bad.request.target_old) == ("I hate it.", "I love it.")
    first, again = bad.probes
    assert (first.kind, first.answers, first.rival) == ("long", ("I hate it.", "Awful stuff."), "I love it.")
    assert (again.kind, again.prompt, again.form) == ("long_paraphrase", "How do you view tea?", "long")
    with pytest.raises(Skip, match="pos and neg"):
        case({**TOPIC, "neg": []})


@pytest.mark.parametrize(("erased", "kept"), [("K_F", "K_R"), ("success", "locality")])
def test_erased_facts_share_the_retained_questions(erased, kept):
    document = {erased: [ERASED, {**ERASED, "question": "Other?"}], kept: [retained(i) for i in range(5)]}
    rows = list(knowedit.DATASET.records(document, "sanitation"))
    made = [case(row, "sanitation", i) for i, row in enumerate(rows)]
    assert made[0].request.text == made[0].request.subject == "Which {} bird sings?"
    assert asked(made[0], "efficacy") == [("Which {} bird sings?", ("I don't know.",), ("Lark",), "Lark")]
    assert [prompt for prompt, *_ in asked(made[0], "locality")] == [
        "Question 0?",
        "Question 2?",
        "Question 4?",
    ]
    assert asked(made[1], "locality") == [
        ("Question 1?", ("Answer 1",), ("Answer 1",), None),
        ("Question 3?", ("Answer 3",), ("Answer 3",), None),
    ]
    assert all(knowedit.DATASET.fits(row) for row in rows) and knowedit.DATASET.fits(document)


def test_lists_are_unpacked_as_they_are():
    assert list(knowedit.DATASET.records([FACT], "recent")) == [FACT]


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"rows": []}, "K_F and K_R.* found rows"),
        (3, "found int"),
        ({"K_F": 3, "K_R": []}, "K_F: expected a list of records"),
        ({"K_F": [ERASED, "x"]}, "K_F: expected a list of records"),
        ({"K_F": [ERASED], "K_R": {}}, "K_R: expected a list of records"),
    ],
)
def test_other_documents_are_refused(document, says):
    with pytest.raises(Malformed, match=says):
        list(knowedit.DATASET.records(document, "sanitation"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"portability": {"Guessing": []}}, "expected the criteria .* found Guessing"),
        ({"locality": [1]}, "found list"),
        ({"locality": {"Forgetfulness": ["x"]}}, "locality.Forgetfulness"),
        ({"ground_truth": {"a": 1}}, "ground_truth"),
        ({"target_new": None}, "target_new"),
    ],
)
def test_a_wrong_field_is_named(change, says):
    with pytest.raises(Malformed, match=says):
        case({**FACT, **change})


def test_facts_count_criteria():
    assert knowedit.DATASET.facts([case(FACT), case(TOPIC)]) == {
        "probes by criterion": {
            "Subject_Aliasing": 1,
            "Reasoning": 1,
            "Logical_Generalization": 1,
            "Relation_Specificity": 1,
            "Forgetfulness": 1,
        },
        "cases without criteria": 1,
    }


def test_questions_without_an_answer_are_counted(tmp_path):
    path = tmp_path / "recent_test.json"
    path.write_text(json.dumps([FACT, FACT, {**FACT, "subject": "absent"}]), encoding="utf-8")
    assert check(path).facts["left out of cases"] == {"Reasoning without an answer": 2}
    assert check(f"{path}:1").facts["left out of cases"] == {"Reasoning without an answer": 1}
    path.write_text(json.dumps({"K_F": [ERASED], "K_R": [retained(0), {"question": "Q?"}]}), encoding="utf-8")
    found = check(path)
    assert found.probes["locality"] == 1
    assert found.facts["left out of cases"] == {"retained questions without an answer": 1}


def test_it_is_told_from_other_records():
    assert all(knowedit.DATASET.fits(record) for record in (FACT, LIFE, TOPIC, ERASED))
    flat = {"subject": "a", "prompt": "a", "target_new": "b", "ground_truth": "c"}
    for other in (flat, {**flat, "portability": {"New Question": "x"}}, {**flat, "locality": "x"}, [], "x"):
        assert not knowedit.DATASET.fits(other)


def test_questions_that_restate_the_edited_fact_are_of_a_kind_of_their_own():
    """ "The birthplace of Vela Orn is" keeps its answer in the file, which the edit is there to change."""
    kept = [
        {"prompt": "Vela Orn place of birth", "ground_truth": ["sund "]},  # the old answer, other capitals
        {"prompt": "The father of Vela Orn is", "ground_truth": ["Bo Orn"]},
        {"prompt": "The birthplace of Vela Orn is", "ground_truth": [["Sund Town", "Sund"]]},
    ]
    made = case({**FACT, "locality": {"Relation_Specificity": kept}})
    assert [prompt for prompt, *_ in asked(made, "restated")] == [kept[0]["prompt"], kept[2]["prompt"]]
    assert [prompt for prompt, *_ in asked(made, "same_subject")] == [kept[1]["prompt"]]
    counted = knowedit.DATASET.facts([made])
    assert counted["locality questions that restate the edited fact"] == 2
    assert counted["probes by criterion"]["Relation_Specificity"] == 3  # all that the file has
    # without an old answer nothing can be told to restate it
    recent = {name: value for name, value in FACT.items() if name != "ground_truth"}
    made = case({**recent, "locality": {"Relation_Specificity": kept}})
    assert len(asked(made, "same_subject")) == 3


@pytest.mark.parametrize("target", ["Sund", " sund", "Sund City", "SUND  CITY"])
def test_a_target_that_is_the_old_answer_has_no_rival_and_is_counted(target):
    made = case({**FACT, "target_new": target})
    assert made.probes[0].rival is None
    assert knowedit.DATASET.facts([made, case(FACT)])["requests whose target is the old answer"] == 1


def test_a_biography_has_no_sentence_for_a_rival():
    (probe,) = [p for p in case(LIFE).probes if p.kind == "same_subject"]
    assert probe.rival is None


def test_facts_to_erase_name_their_subject():
    fact = {**ERASED, "question": "Which land has a song called The Grey Goat?", "subject": "The Grey Goat"}
    made = case(fact)
    assert (made.request.subject, made.request.text) == ("The Grey Goat", fact["question"])
    for odd in ({**fact, "subject": "The Red Goat"}, {**fact, "subject": ""}, {**ERASED, "subject": "bird"}):
        assert (
            case(odd).request.subject == odd["question"]
        )  # not there, or not to be marked: the question stands


@pytest.mark.parametrize(
    ("record", "variant"),
    [
        (FACT, "zsre"),
        ({k: v for k, v in FACT.items() if k not in ("rephrase_prompt", "cond")}, "counterfact"),
        (
            {k: v for k, v in FACT.items() if k not in ("rephrase_prompt", "cond", "ground_truth")},
            "recent",
        ),
        (LIFE, "wikibio"),
        (TOPIC, "convsent"),
        (ERASED, "sanitation"),
    ],
)
@pytest.mark.parametrize("name", ["copy.json", "recent_test.json", "train_cf.json", "wikibio-train-all.json"])
def test_the_six_sets_are_told_by_their_records_under_any_name(tmp_path, record, variant, name):
    path = tmp_path / name
    path.write_text(json.dumps([record, record]), encoding="utf-8")
    assert check(path).name == check(f"knowedit@{path}").name == f"knowedit/{variant}"
