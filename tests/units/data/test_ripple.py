"""RippleEdits: reading subject and target off a sentence; tests, their groups and conditions."""

from __future__ import annotations

import json

import pytest

from errata.data._base import Malformed, Record, Skip
from errata.data.reading import check
from errata.data.sets import ripple_edits


def query(prompt, *answers, targets=None, kind="regular"):
    return {
        "prompt": prompt,
        "answers": [{"value": names[0], "aliases": list(names[1:])} for names in answers],
        "query_type": kind,
        "subject_id": "Q1",
        "relation": "ANY",
        "target_ids": targets or [f"Q{80 + i}" for i in range(len(answers))],
        "phrase": None,
    }


def trial(queries, condition="OR", conditions=()):
    return {"test_queries": queries, "test_condition": condition, "condition_queries": list(conditions)}


def fact(prompt, target="Q9", relation="COUNTRY_OF_CITIZENSHIP"):
    return {"prompt": prompt, "subject_id": "Q1", "relation": relation, "target_id": target}


STEM = "The name of the country of citizenship of Vela Orn is"
RECORD = {
    "example_type": "popular",
    "edit": {**fact(f"{STEM} Ruvia."), "original_fact": fact(f"{STEM} Taland.", "Q8")},
    "Relation_Specificity": [
        trial([query("The gender of Vela Orn is", ("female", "f", "woman"))]),
    ],
    "Logical_Generalization": [
        trial([query("A:", ("yes",)), query("B:", ("no",))]),
        trial([query("A:", ("yes",)), query("B:", ("no",))], "AND"),
    ],
    "Subject_Aliasing": [
        trial(
            [
                query(
                    "The name of the country of citizenship of V. Orn is",
                    ("Ruvia", "Ruvian Realm"),
                    targets=["Q9"],
                )
            ],
        )
    ],
    "Compositionality_I": [
        trial(
            [query("The capital of the country of Vela Orn is", ("Kesh",), kind="two_hop")],
            conditions=[query("The name of the capital city of Ruvia is", ("Kesh", "Kesh City"))],
        )
    ],
    "Compositionality_II": [],
    "Forgetfulness": [],
}


def case(record=RECORD):
    (made,) = ripple_edits.DATASET.cases(Record(record, "record 5", 4), "popular")
    return made


def changed(**edit):
    record = json.loads(json.dumps(RECORD))
    record["Subject_Aliasing"] = []
    record["edit"].update(edit)
    return record


def test_the_target_is_cut_off_and_the_subject_found():
    made = case()
    assert made.id == "ripple_edits:4"
    wanted = made.request
    assert (wanted.text, wanted.subject) == (STEM, "Vela Orn")
    assert (wanted.target, wanted.target_old) == ("Ruvia", "Taland")
    efficacy = made.probes[0]
    assert (efficacy.kind, efficacy.answers, efficacy.before) == (
        "efficacy",
        ("Ruvia", "Ruvian Realm"),
        ("Taland",),
    )


@pytest.mark.parametrize(
    ("stem", "subject", "relation"),
    [
        ("The name of the mother of House of Orn is", "House of Orn", "MOTHER"),
        ("The names of the siblings of Vela Orn are", "Vela Orn", "SIBLING"),
        ("The place of birth of Vela of Kesh is", "Vela of Kesh", "PLACE_OF_BIRTH"),
        ("The name of the field of work of Vela Orn is", "Vela Orn", "FIELD_OF_WORK"),
        ("The name of the head of state of Ruvia is", "Ruvia", "HEAD_OF_STATE"),
        ("The gender of Vela Orn is", "Vela Orn", "SEX_OR_GENDER"),
        ("The eye color of Vela Orn is", "Vela Orn", "EYE_COLOR"),
        ("The name of the alma mater of Vela Orn is", "Vela Orn", "ALMA_MATER"),
        ("The name of the author of The Children of Rain is", "The Children of Rain", "AUTHOR"),
        ("The name of the position held by Vela Orn is", "Vela Orn", "POSITION_HELD"),
        ("The name of the currency in Ruvia is", "Ruvia", "CURRENCY"),
        ("The number of children Vela Orn has is", "Vela Orn", "NUMBER_OF_CHILDREN"),
        ("The name of the award Vela Orn won is", "Vela Orn", "AWARD_RECEIVED"),
        ("The name of the league which Kesh Rovers plays in is", "Kesh Rovers", "LEAGUE"),
        ("The name of the country which Kesh is the capital of is", "Kesh", "CAPITAL_OF"),
        ("The name of the ethnic group which Orn is associated with is", "Orn", "ETHNIC_GROUP"),
        ("The name of the sports team which Orn is a member of is", "Orn", "MEMBER_OF_SPORTS_TEAM"),
        ("What Is Rain follows", "What Is Rain", "FOLLOWS"),
        ("Rain is over is followed by", "Rain is over", "FOLLOWED_BY"),
    ],
)
def test_every_sentence_of_the_dataset_is_read(stem, subject, relation):
    new, old = (fact(f"{stem} {target}.", relation=relation) for target in ("Mirror Day", "Mirror Night"))
    wanted = case(changed(**new, original_fact=old)).request
    assert (wanted.text, wanted.subject) == (stem, subject)
    # targets that begin alike stay whole
    assert (wanted.target, wanted.target_old) == ("Mirror Day", "Mirror Night")


def recent(**edit):
    record = changed(**edit)
    del record["edit"]["original_fact"]
    return record


def test_only_the_full_stop_of_the_sentence_goes():
    made = case(recent(**fact("The place of birth of Vela Orn is Kesh, R.T..")))
    assert made.request.target == "Kesh, R.T."


def test_a_recent_edit_has_no_old_target():
    made = case(recent())
    assert made.request.target_old is None
    assert (made.probes[0].before, made.probes[0].rival) == ((), None)


def test_an_original_object_without_label_is_unknown():
    assert case(changed(original_fact=fact(f"{STEM} ."))).request.target_old is None


SONG = "The name of the anthem of Ruvia is"
WORDY = fact(f"{SONG} All there is here.")


def test_a_target_that_holds_a_verb_needs_another_sentence_to_be_told():
    with pytest.raises(Skip, match="several parses"):
        case(recent(**WORDY))
    wanted = case(changed(**WORDY, original_fact=fact(f"{SONG} Old Song."))).request
    assert (wanted.text, wanted.subject, wanted.target) == (SONG, "Ruvia", "All there is here")
    assert wanted.target_old == "Old Song"


def test_a_query_that_names_the_target_tells_it():
    record = recent(**WORDY)
    song = query("The song of Ruvia is", ("All there is here", "Here"), targets=["Q9"])
    record["Subject_Aliasing"] = [trial([song])]
    made = case(record)
    assert (made.request.subject, made.request.target) == ("Ruvia", "All there is here")
    assert made.probes[0].answers == ("All there is here", "Here")


def test_labels_that_are_given_are_taken():
    record = changed(subject_label="Orn", target_label="Ruvia")
    assert (case(record).request.subject, case(record).request.target) == ("Orn", "Ruvia")
    with pytest.raises(Skip, match="does not end in its target 'Sund'"):
        case(changed(target_label="Sund"))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (fact("The name of the country of citizenship of Vela Orn is ."), "does not end in a target"),
        (fact("The name of the country which Orn is associated with is."), "does not end in a target"),
        (fact("Vela Orn lives in Ruvia."), "does not end in a target"),
        (fact("Everyone says that Vela Orn is Ruvian."), "none of the dataset"),
        ({"original_fact": fact(f"{STEM} Ruvia.")}, "changes nothing"),
        ({"original_fact": fact("The gender of Vela Orn is female.")}, "with the original fact"),
    ],
)
def test_what_cannot_be_read_is_skipped_with_the_reason(edit, says):
    with pytest.raises(Skip, match=says):
        case(changed(**edit) if "original_fact" in edit else recent(**edit))


def group(name, record=RECORD):
    return [(p.kind, p.prompt, p.answers, p.need) for p in case(record).probes if p.group == name]


def test_or_needs_any_and_and_needs_all():
    assert {need for *_, need in group("Logical_Generalization 1")} == {"any"}
    assert {need for *_, need in group("Logical_Generalization 2")} == {"all"}
    assert [answers for _, _, answers, _ in group("Logical_Generalization 2")] == [("yes",), ("no",)]


def test_conditions_join_the_group_of_their_test():
    assert group("Compositionality_I 1") == [
        ("compositionality_1", "The capital of the country of Vela Orn is", ("Kesh",), "all"),
        ("condition", "The name of the capital city of Ruvia is", ("Kesh", "Kesh City"), "all"),
    ]


def test_what_is_kept_and_what_changes():
    by_kind = {p.kind: p for p in case().probes}
    assert not by_kind["relation_specificity"].changes and not by_kind["condition"].changes
    assert by_kind["subject_aliasing"].before == ("Taland",)
    assert by_kind["compositionality_1"].changes and by_kind["compositionality_1"].before == ()


def test_single_letters_are_no_answers():
    assert group("Relation_Specificity 1")[0][2] == ("female", "woman")


def test_of_several_answers_every_one_is_asked_for():
    siblings = query("The names of the siblings of Vela Orn are", ("Ada", "A. Orn"), ("Bo Orn",))
    record = {**RECORD, "Relation_Specificity": [trial([siblings])]}
    assert [(answers, need) for _, _, answers, need in group("Relation_Specificity 1", record)] == [
        (("Ada", "A. Orn"), "all"),
        (("Bo Orn",), "all"),
    ]


def test_in_an_or_of_queries_any_answer_is_enough():
    several = query("A:", ("Ada",), ("Bo Orn",))
    record = {**RECORD, "Logical_Generalization": [trial([several, query("B:", ("no",))])]}
    assert [(answers, need) for _, _, answers, need in group("Logical_Generalization 1", record)] == [
        (("Ada", "Bo Orn"), "any"),
        (("no",), "any"),
    ]


def test_a_test_that_no_answer_can_pass_is_left_out():
    hopeless = query("A:", ("x",))  # one letter, so no answer
    fine = query("B:", ("no",))
    for test in (
        trial([hopeless]),
        trial([hopeless, fine], "AND"),
        trial([fine], conditions=[hopeless]),
    ):
        assert group("Forgetfulness 1", {**RECORD, "Forgetfulness": [test]}) == []
    (left,) = group("Forgetfulness 1", {**RECORD, "Forgetfulness": [trial([hopeless, fine])]})
    assert left[1] == "B:"


def test_what_is_left_out_of_a_case_is_counted(tmp_path):
    hopeless, fine = query("A:", ("x",)), query("B:", ("no",))
    path = tmp_path / "popular.json"
    path.write_text(json.dumps([RECORD]), encoding="utf-8")
    assert "left out of cases" not in check(path).facts
    tests = [trial([hopeless]), trial([hopeless, fine], "AND"), trial([hopeless, fine])]
    path.write_text(json.dumps([{**RECORD, "Forgetfulness": tests}]), encoding="utf-8")
    assert check(path).facts["left out of cases"] == {
        "Forgetfulness tests without an answer, which the authors' check passes": 2,
        "queries without an answer, beside others": 1,
    }  # fmt: skip


def test_an_unknown_condition_is_malformed():
    with pytest.raises(Malformed, match="expected OR or AND, found 'XOR'"):
        case({**RECORD, "Forgetfulness": [trial([], "XOR")]})


def test_facts_count_tests_once_and_probes_all():
    counted = ripple_edits.DATASET.facts([case(), case()])
    assert counted["tests"]["logical_generalization"] == 4
    assert counted["probes"]["logical_generalization"] == 8
    assert (counted["conditions"], counted["requests without old target"]) == (2, 0)


def test_it_is_told_from_other_records():
    recent = {name: value for name, value in RECORD.items() if name != "Forgetfulness"}
    assert ripple_edits.DATASET.fits(RECORD) and ripple_edits.DATASET.fits(recent)
    for other in ({}, [RECORD], {"edit": {"prompt": "x"}}, {**RECORD, "edit": "x"}):
        assert not ripple_edits.DATASET.fits(other)


def test_preservation_is_told_by_its_question_wherever_it_stands():
    """Files filtered by the authors' code have it among Compositionality II; its answer must stay."""
    asked = query(f"{STEM[:-3]}, which is not Ruvia, is", ("Taland", "Tal"))
    made = case({**RECORD, "Compositionality_II": [trial([asked], conditions=[asked])]})
    (found,) = [p for p in made.probes if p.kind == "forgetfulness"]
    assert found.answers == found.before == ("Taland", "Tal") and not found.changes
    assert not [p for p in made.probes if p.kind == "compositionality_2"]
    assert found.group == "Compositionality_II 1"


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("The name of the award Vela Orn won, which is not Ruvia, is", "forgetfulness"),
        ("The names of the siblings of Vela Orn, which are not Bo, are", "compositionality_2"),
        ("The child of Vela Orn, which is not Ruvia Minor, are", "forgetfulness"),
        ("The land which is not by the sea is", "compositionality_2"),
        ("The river of the country of Vela Orn is", "compositionality_2"),
    ],
)
def test_only_the_datasets_own_exception_makes_a_preservation_query(prompt, kind):
    made = case({**RECORD, "Compositionality_II": [trial([query(prompt, ("Kesh",))])]})
    (found,) = [p for p in made.probes if p.prompt == prompt]
    assert found.kind == kind and found.changes == (kind == "compositionality_2")


def test_a_test_of_which_one_query_is_of_another_form_keeps_its_criterion():
    mixed = [
        query("The land of Vela Orn, which is not Ruvia, is", ("Taland",)),
        query("Her river is", ("Lum",)),
    ]
    made = case({**RECORD, "Compositionality_II": [trial(mixed, "AND")]})
    assert sum(p.kind == "compositionality_2" for p in made.probes) == 2


def test_the_authors_share_counts_tests_without_an_answer_as_passed():
    """Of 102 tests asked half are right; 86 cannot be: (51 + 86) / 188."""
    assert ripple_edits.authors_share(0.5, 102, 86) == pytest.approx(137 / 188)
    assert ripple_edits.authors_share(0.5, 102, 0) == 0.5
    assert ripple_edits.authors_share(0.0, 0, 3) == 1.0
    assert ripple_edits.authors_share(0.3, 0, 0) != ripple_edits.authors_share(0.3, 0, 0)  # NaN


def test_recent_facts_are_told_by_having_no_original():
    recent = {**RECORD, "edit": fact(f"{STEM} Ruvia.")}
    tell = ripple_edits.DATASET.variants_of
    assert tell is not None
    assert tell([recent, recent]) == ("recent",)
    assert tell([recent, RECORD])[0] == "popular"
