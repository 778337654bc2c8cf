"""The datasets read from small files in their schema, with content made up for them: what became of each field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errata.data import formats
from errata.data._base import Dataset, Malformed, Record, Skip
from errata.data.reading import check, read
from errata.data.requests import write_cases
from errata.data.sets import REGISTRY, dune, me_ppl, mlake
from errata.errors import ErrataError
from errata.types import Case, Probe

FOLDER = Path(__file__).parents[2] / "fixtures" / "data"

EXPECTED = {
    "wise_hallucination.json": ("wise/hallucination", 3, 3),
    "wise_temporal.json": ("wise/temporal", 1, 1),
    "known_1000.json": ("known_1000", 2, 2),
    "bmike53_enzh-cn.json": ("bmike53/cross", 2, 2),
    "bmike53_wfd_ende.json": ("bmike53/cross", 2, 2),
    "zsre_train.json": ("zsre/alt", 2, 2),
    "cknowedit.json": ("cknowedit", 2, 2),
    "hallueditbench.csv": ("hallueditbench", 2, 2),
    "pitfalls_reverse.json": ("pitfalls/reverse", 1, 2),
    "pitfalls_composite.json": ("pitfalls/composite", 1, 2),
    "pitfalls_round.json": ("pitfalls/round", 1, 2),
    "taxi_edits.json": ("taxi/edits", 2, 2),
    "taxi_evaluation.json": ("taxi/evaluation", 4, 4),
    "dune_new_info.json": ("dune/new_info", 3, 2),
    "dune_arithmetic.json": ("dune/arithmetic", 2, 2),
    "leapofthought.jsonl": ("leapofthought", 2, 2),
    "codeupdatearena.json": ("codeupdatearena", 1, 1),
    "mlake_single.json": ("mlake/single-hop", 2, 2),
    "mlake_choice.json": ("mlake/single-hop-choice", 1, 1),
    "medcf.json": ("medcf/medcf", 1, 1),
    "medfe.json": ("medcf/medfe", 1, 1),
    "peak.json": ("peak/counter", 1, 1),
    "peak_time.json": ("peak/time", 1, 1),
    "safeedit.json": ("safeedit", 1, 1),
    "elken.json": ("elken", 1, 1),
}


def cases(name: str, variant: str = "") -> list[Case]:
    dataset = EXPECTED[name][0].partition("/")[0]
    return read(f"{dataset}/{variant}@{FOLDER / name}" if variant else FOLDER / name).cases


def asked(case: Case, kind: str) -> list[Probe]:
    return [probe for probe in case.probes if probe.kind == kind]


@pytest.mark.parametrize("name", EXPECTED)
def test_dataset_variant_rows_and_cases(name):
    found = check(FOLDER / name)
    assert (found.name, found.rows, found.cases) == EXPECTED[name]
    assert not found.malformed and found.broken is None and not found.renamed


@pytest.mark.parametrize("name", EXPECTED)
def test_cases_keep_the_rules_of_probes_and_come_back_from_a_file(tmp_path, name):
    made = cases(name)
    for case in made:
        assert case.probes[0].kind in ("efficacy", "long") and case.id.startswith(
            f"{EXPECTED[name][0].split('/')[0]}:"
        )
        for probe in case.probes:
            assert probe.prompt.strip() == probe.prompt
            assert probe.form != "choice" or set(probe.answers) <= set(probe.choices)
            assert probe.answers or probe.form == "open"
    write_cases(tmp_path / "cases.jsonl", made)
    assert read(f"cases@{tmp_path / 'cases.jsonl'}").cases == made


ODD = (None, 17, True, "", "  ", [], {}, [17], {"a": 17}, [[]], "{} {}", float("nan"))


def damaged(value: Any) -> Iterator[Any]:
    """Yield copies of a record with one of its fields, at any depth, replaced by something odd or left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        for odd in (*ODD, *damaged(inner)):
            copy = value.copy()
            copy[key] = odd
            yield copy
        copy = value.copy()
        del copy[key]
        yield copy


def raw(name: str, dataset: Dataset) -> list[Any]:
    path = FOLDER / name
    rows = [row.value for row in formats.rows(path, formats.layout(path))]
    return list(dataset.records(rows[0], dataset.variants[0])) if dataset.records else rows


@pytest.mark.parametrize("name", EXPECTED)
def test_a_damaged_record_is_left_out_with_a_reason_and_never_fails_otherwise(name):
    """Also nothing is made of a number or a mapping where a text belongs: its words would stand in a probe."""
    dataset = REGISTRY.get(EXPECTED[name][0].partition("/")[0])
    first = raw(name, dataset)[0]
    variants = list(damaged(first))
    assert len(variants) > 10
    for record in variants:
        for variant in dataset.variants:
            dataset.fits(record)
            try:
                made = list(dataset.cases(Record(record, "record 1", 0), variant))
            except ErrataError:
                continue
            texts = [text for case in made for p in case.probes for text in (p.prompt, *p.answers, *p.before)]
            assert not {"17", "True\n", "nan", "None", "{'a': 17}", "[17]"} & set(texts), (variant, record)
            assert all(probe.prompt.strip() for case in made for probe in case.probes)
        if dataset.variants_of:
            assert set(dataset.variants_of([record])) <= set(dataset.variants)


# --- WISE ----------------------------------------------------------------------------------------------------


def test_wise_texts_are_scored_by_perplexity_and_cut_words_put_together():
    first, second, third = cases("wise_hallucination.json")
    assert first.request.subject == "vela orn" and first.request.target_old is None
    efficacy, long, locality = first.probes
    assert (efficacy.form, long.form, locality.form) == ("span", "long", "span")
    assert efficacy.answers == long.answers == (first.request.target,)
    assert locality.prompt == "Rooms for rent in the old"
    assert locality.answers == locality.before == ("harbour, with a view of the ferries.",)
    assert asked(second, "locality")[0].prompt == "The market opens"
    assert not asked(third, "locality")  # it has no second piece, which the check counts
    assert check(FOLDER / "wise_hallucination.json").facts["left out of cases"] == {
        "web texts without a second piece": 1
    }
    (temporal,) = cases("wise_temporal.json")
    (again,) = asked(temporal, "paraphrase")
    assert again.prompt.startswith("The Lum Canal, as") and again.answers == (temporal.request.target,)


def test_known_facts_are_right_before_and_after():
    case = cases("known_1000.json")[0]
    (probe,) = case.probes
    assert (probe.prompt, probe.answers) == (
        "Mount Ruv stands in the land of",
        ("Ruvia",),
    ) and not probe.changes


# --- BMIKE-53 ------------------------------------------------------------------------------------------------


def test_bmike_edits_in_one_language_and_asks_in_both():
    case = cases("bmike53_enzh-cn.json")[0]
    assert case.request.text == "Where was Vela Orn born?" and case.request.target == "Kesh"
    kinds = [probe.kind for probe in case.probes]
    plain = ["efficacy", "paraphrase", "locality", "one_hop"]
    assert kinds == [*plain, *(f"cross_{kind}" for kind in plain)]
    (crossed,) = asked(case, "cross_efficacy")
    assert (crossed.prompt, crossed.answers) == ("维拉·奥恩出生在哪里？", ("凯什",))
    (kept,) = asked(case, "cross_locality")
    assert kept.answers == kept.before == ("博·塔恩",)
    assert asked(case, "cross_one_hop")[0].answers == ("卢姆河",)
    assert case.request.language == "en"
    assert [probe.language for probe in case.probes] == ["en"] * 4 + ["zh-cn"] * 4


def test_bi_zsre_has_the_same_form_with_two_languages():
    row = {
        "src": "Where is Vela?",
        "rephrase": "Vela is where?",
        "alt": "Kesh",
        "subject": "Vela",
        "loc": "nq question: who?",
        "loc_ans": "Bo",
        "portability": {"New Question": "Q?", "New Answer": "Lum"},
    }
    other = {**row, "src": "维拉在哪里？", "rephrase": "维拉位于何处？", "alt": "凯什", "subject": "维拉"}
    value = {"en": row, "zh": other}  # fmt: skip
    dataset = REGISTRY.get("bmike53")
    assert dataset.fits(value)
    (case,) = dataset.cases(Record(value, "record 1", 0), "cross")
    (back,) = dataset.cases(Record(value, "record 1", 0), "reverse")
    assert (case.request.language, back.request.language) == ("en", "zh")
    assert (
        asked(case, "cross_efficacy")[0].language == "zh"
        and asked(back, "cross_efficacy")[0].language == "en"
    )
    assert back.request.subject == "维拉" and back.request.target == "凯什"


def test_bmike_in_the_other_direction_and_in_one_language():
    reverse = cases("bmike53_enzh-cn.json", "reverse")
    assert [case.request.target for case in reverse] == [
        "凯什"
    ]  # the second row's subject is spelled otherwise
    assert asked(reverse[0], "cross_efficacy")[0].answers == ("Kesh",)
    found = check(f"bmike53/reverse@{FOLDER / 'bmike53_enzh-cn.json'}")
    assert (found.subject_absent, len(found.skipped), found.cases) == (1, 1, 1)
    for variant, target in (("en", "Kesh"), ("other", "凯什")):
        case = cases("bmike53_enzh-cn.json", variant)[0]
        assert case.request.target == target and len(case.probes) == 4


def test_bmikes_wikifactdiff_has_old_answers():
    first, second = cases("bmike53_wfd_ende.json")
    assert first.request.target_old == "Choir" and asked(first, "cross_efficacy")[0].rival == "Chor"
    assert first.id == "bmike53:7"
    assert not asked(second, "locality") and not asked(second, "cross_locality")
    with pytest.raises(Skip, match="changes nothing"):
        row = {"subject": "Lum", "src": "Lum flows past", "alt": "Sund", "old": "sund", "rephrase": "x"}
        list(REGISTRY.get("bmike53").cases(Record({"en": row, "de": row}, "record 1", 0), "cross"))


@pytest.mark.parametrize("value", [{"en": {}}, {"en": {"src": 1}, "de": {}}, {"English": 1, "en": 2}, [1]])
def test_bmike_takes_only_rows_by_language(value):
    assert not REGISTRY.get("bmike53").fits(value)
    with pytest.raises(Malformed):
        list(REGISTRY.get("bmike53").cases(Record(value, "record 1", 0), "cross"))


def test_zsre_without_gold_answers_is_read_as_alt_alone():
    case = cases("zsre_train.json")[0]
    assert (case.request.target, case.request.target_old, case.probes[0].rival) == ("Kesh", None, None)
    true = check(f"zsre/true@{FOLDER / 'zsre_train.json'}")
    assert true.cases == 0 and len(true.skipped) == 2 and "no gold answer" in true.skipped[0].reason


# --- Chinese, hallucinations ---------------------------------------------------------------------------------


def test_cknowedit_names_no_subject_and_has_answers_of_two_lengths():
    poem, trick = cases("cknowedit.json")
    assert poem.request.subject == poem.request.text == "请填写下一句：河水流过凯什，"
    assert check(FOLDER / "cknowedit.json").subject_is_prompt == 2
    assert (poem.probes[0].form, trick.probes[0].form) == ("short", "long")
    assert (poem.probes[0].before, poem.probes[0].rival) == (("不回头。",), "不回头。")
    assert len(asked(poem, "paraphrase")) == 2 and not asked(poem, "locality")
    assert asked(trick, "locality")[0].before == ("蜜蜂。",) and asked(trick, "portability")[0].before == ()


def test_hallucinations_are_asked_in_every_form():
    case = cases("hallueditbench.csv")[0]
    assert (case.request.target, case.request.target_old) == ("Lum", "Sund")
    assert [(p.prompt, p.answers) for p in asked(case, "yes_no")] == [
        ("Is Lum the river of Kesh?\nAnswer:", ("Yes",)), ("Is Sund the river of Kesh?\nAnswer:", ("No",)),
    ]  # fmt: skip
    (several,) = asked(case, "multiple_choice")
    assert several.choices == ("A", "B", "C", "D") and several.answers == ("B",)
    assert asked(case, "inverse")[0].answers == ("Kesh",)
    assert [asked(case, f"{n}_hop")[0].answers for n in ("two", "six")] == [("thing 2",), ("thing 6",)]
    facts = check(FOLDER / "hallueditbench.csv").facts
    assert facts["left out of cases"] == {"locality questions, which have no answer": 2}


# --- Pitfalls, TAXI ------------------------------------------------------------------------------------------


def test_a_contradicting_edit_is_asked_against_what_the_first_implies():
    first, second = cases("pitfalls_reverse.json")
    assert (first.request.text, first.request.target) == ("The work of Vela Orn is", "The Red Map")
    (conflict,) = asked(second, "conflict")
    assert (conflict.prompt, conflict.answers, conflict.rival) == (
        "The maker of The Red Map is",
        ("Bo Tarn",),
        "Vela Orn",
    )
    first, second = cases("pitfalls_composite.json")
    (conflict,) = asked(second, "conflict")
    assert (conflict.answers, conflict.rival) == (
        ("Brae",),
        "Taland",
    )  # what the first edit made of the post's land
    (kept,) = asked(second, "prerequisite")
    assert (kept.prompt, kept.before) == ("Ada Sund held the post of", ("warden of Kesh",))


def test_an_edit_taken_back_must_leave_the_other_right_answers():
    there, back = cases("pitfalls_round.json")
    assert (there.request.target, there.request.target_old) == ("Kesh", "Ruvia")
    assert (back.request.target, back.request.target_old) == ("Ruvia", "Kesh")
    assert [(p.answers, p.before, p.rival) for p in asked(back, "true_object")] == [
        (("Taland",), ("Taland",), "Kesh"), (("Brae",), ("Brae",), "Kesh"),
    ]  # fmt: skip


def test_taxis_questions_are_choices_forward_and_reversed():
    category, moves, has, _ = cases("taxi_evaluation.json")
    assert (category.request.text, category.request.target) == ("a redling is a kind of", "goat")
    assert category.request.target_old == "finch"
    (reversed_,) = asked(category, "inverse_property")
    assert (reversed_.prompt, reversed_.choices) == (
        "a",
        ("redling is a kind of goat", "pikelet is a kind of goat"),
    )
    (forward,) = asked(moves, "property")
    assert (forward.prompt, forward.answers, forward.before) == ("redling move by", ("walking",), ("flying",))
    (reversed_,) = asked(moves, "inverse_property")
    assert (reversed_.prompt, reversed_.answers) == ("walking is the movement of", ("redling",))
    assert not asked(has, "property_kept")[0].changes and not asked(has, "inverse_property")[0].changes


def test_taxis_questions_may_be_gathered_by_edit():
    first, second = cases("taxi_evaluation.json", "edits")
    assert (len(first.probes), len(second.probes)) == (7, 3)
    assert [case.request.subject for case in cases("taxi_edits.json")] == ["redling", "Kesh dwarf"]


# --- DUNE, LeapOfThought, code -------------------------------------------------------------------------------


def test_dunes_sentences_are_continued_after_date_or_equals_sign():
    first, second = cases("dune_new_info.json")
    assert (first.request.text, first.request.target) == (
        "March 3–4, 2022 –", "The bridge of Kesh opens again after nine years.",
    )  # fmt: skip
    assert (second.request.text, second.request.subject) == ("April 9:", "April 9")
    assert [p.choices for p in asked(second, "question")] == [("A", "B", "C", "D"), ("A", "B")]
    sums = cases("dune_arithmetic.json")
    assert [(c.request.text, c.request.target) for c in sums] == [("8 / 2 + 4 =", "8"), ("8 * 3 =", "24")]
    assert sums[1].probes[1].answers == ("24",)


def test_dunes_questions_on_locality_go_to_other_cases():
    news = dune.locality(FOLDER / "dune_new_info_locality.json")
    sums = dune.locality(FOLDER / "dune_arithmetic_locality.json")
    assert [(p.kind, p.answers, p.before) for p in (*news, *sums)] == [
        ("locality", ("A",), ("A",)), ("locality", ("7",), ("7",)),
    ]  # fmt: skip
    made = dune.with_locality(cases("dune_new_info.json"), [*news, *sums])
    assert [case.probes[-1].kind for case in made] == ["locality", "locality"]


def test_leap_of_thought_edits_the_property_and_asks_what_follows():
    first, second = cases("leapofthought.jsonl")
    assert (first.request.text, first.request.subject) == ("A finch has a beak. True or false?", "finch")
    assert asked(first, "logical")[0].answers == ("True",) and asked(second, "logical")[0].answers == (
        "False",
    )
    assert asked(first, "premise")[0].prompt.startswith("A redling is a finch.")
    assert asked(first, "distractor")[0].before == ("True",)
    record = json.loads((FOLDER / "leapofthought.jsonl").read_text(encoding="utf-8").splitlines()[1])
    record["metadata"]["rules"] = ["A goat does not have a wheel."]
    with pytest.raises(Skip, match="state the property"):
        list(REGISTRY.get("leapofthought").cases(Record(record, "line 2", 1), ""))


def test_an_update_of_an_interface_is_its_docstring_after_the_signature():
    (case,) = cases("codeupdatearena.json")
    assert (case.request.subject, case.request.text) == (
        "rowtools.pick",
        "rowtools.pick(rows, /, limit=None)",
    )
    (program,) = asked(case, "program")
    assert program.prompt.endswith("def two(rows: list) -> list:") and "limit=2" in program.answers[0]


# --- sets without files --------------------------------------------------------------------------------------


def test_mlakes_questions_and_sentences():
    first, second = cases("mlake_single.json")
    assert first.probes[0].rival is None  # the old answer is an alias of the new one
    assert second.probes[0].rival == "mill" and second.probes[0].answers == ("Guild", "the Guild")
    assert [p.prompt for p in asked(second, "paraphrase")] == ["Vela Orn works at the"]
    (several,) = cases("mlake_choice.json")
    assert several.request.target == several.probes[0].answers[0] == "Vela Orn works at the Guild."
    assert several.probes[0].rival == several.request.target_old == "Vela Orn works at the mill."


def test_mlakes_multi_hop_questions_join_the_rows_of_the_same_edit(tmp_path):
    rows = list(mlake.with_multi_hop(FOLDER / "mlake_single.json", FOLDER / "mlake_multi.json"))
    (tmp_path / "joined.json").write_text(json.dumps(rows), encoding="utf-8")
    first, second = read(tmp_path / "joined.json").cases
    assert not asked(first, "multi_hop")
    (hop,) = asked(second, "multi_hop")
    assert (hop.answers, hop.before) == (("Kesh", "Kesh Town"), ("Sund",))


def test_medical_facts_keep_four_kinds_of_neighbours():
    (case,) = cases("medcf.json")
    kept = {probe.kind: probe.answers for probe in case.probes if not probe.changes}
    assert kept == {
        "locality_target": ("lumin",), "locality_mapping": ("bark",), "locality_struc": ("cough",),
        "locality_tokensem": ("bird",),
    }  # fmt: skip
    assert asked(case, "locality_target")[0].rival is None  # it shares the target
    assert asked(case, "locality_mapping")[0].rival == "lumin" and case.probes[0].rival == "keshol"
    (explained,) = cases("medfe.json")
    assert [probe.form for probe in explained.probes] == ["long"] * 4


def test_a_further_answer_leaves_the_right_ones():
    (case,) = cases("peak.json")
    assert case.request.target_old is None and case.probes[0].rival is None
    assert [(p.answers, p.rival) for p in asked(case, "right_answer")] == [
        (("Taland",), "Kesh"), (("Sund",), "Lum"), (("Arve",), "Kesh"),
    ]  # fmt: skip
    assert asked(case, "neighbourhood")[1].before == ("Arve",)
    record = json.loads((FOLDER / "peak.json").read_text(encoding="utf-8"))[0]
    with pytest.raises(Skip, match="among the right ones"):
        list(
            REGISTRY.get("peak").cases(Record({**record, "postive_list": ["brae"]}, "record 1", 0), "counter")
        )
    with pytest.raises(Malformed, match="pairs of prompt and answer"):
        list(
            REGISTRY.get("peak").cases(
                Record({**record, "neighborhood_prompts": ["x"]}, "record 1", 0), "counter"
            )
        )


def test_safety_is_for_a_classifier_to_judge():
    (case,) = cases("safeedit.json")
    assert case.request.subject == case.request.text and case.probes[0].rival == case.request.target_old
    further = [probe for probe in case.probes if probe.kind.startswith("safety_")]
    assert len(further) == 4 and all(probe.form == "open" and not probe.answers for probe in further)
    assert not asked(case, "locality")[0].changes


def test_an_events_facts_and_tendencies():
    (case,) = cases("elken.json")
    assert (
        f"{case.request.text} {case.request.target}"
        == "Ada Sund becomes the new warden of Kesh, after Bo Tarn."
    )
    assert asked(case, "event_fact")[0].answers == ("Ada Sund",)
    assert asked(case, "event_fact_kept")[0].before == ("Lum", "the Lum")
    (tendency,) = asked(case, "event_tendency")
    assert (tendency.choices, tendency.answers, tendency.changes) == (("A", "B", "C"), ("A",), True)
    assert not asked(case, "event_tendency_kept")[0].changes


def test_texts_for_perplexity():
    assert me_ppl.texts(FOLDER / "me_ppl.json") == ["The market opens on Mondays.", "Once there was a goat."]
