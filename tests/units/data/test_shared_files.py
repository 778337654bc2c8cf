"""The real files beside the checkout, where they are: counts as published, or as counted here without the readers."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from errata.cli.main import app
from errata.data.reading import check, iterate, read
from errata.data.sets._parts import is_answer

BESIDE = Path(__file__).parents[3].parent / "shared" / "data"
PLACES = [Path(place).expanduser() for place in (os.environ.get("ERRATA_DATA"), BESIDE) if place]
DATA = next((place for place in PLACES if (place / "wise" / "temporal-edit.json").is_file()), BESIDE)
"""Where the real files are: ``$ERRATA_DATA``, else beside the checkout."""

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="the real data files are not part of the repository and not beside the checkout"
)


class Found(NamedTuple):
    """What a check of a file says: dataset and variant, rows, cases; all other rows are skipped with a reason."""

    name: str
    rows: int
    cases: int


EXPECTED: dict[str, Found] = {
    "akew_mquake_cf.json": Found("akew/structured", 354, 354),
    "bmike53/mcounterfact_test_enzh-cn.json": Found("bmike53/cross", 1_031, 1_031),
    "bmike53/mzsre_test_duplicate_enzh-cn.json": Found("bmike53/cross", 743, 743),
    "bmike53/wfd_test_ende.json": Found("bmike53/cross", 784, 784),
    "bmike53/zsre_mend_train_10000.json": Found("zsre/alt", 500, 500),
    "cknowedit/ccks-CKnowEdit.json": Found("cknowedit", 700, 700),
    "codeupdatearena/example_datum.json": Found("codeupdatearena", 1, 1),
    "counterfact-edit.json": Found("counterfact_edit", 10_000, 10_000),
    "counterfact/counterfact_filtered.json": Found("counterfact", 1_000, 1_000),
    "counterfact/known_1000.json": Found("known_1000", 1_209, 1_209),
    "dama_test.json": Found("dama/test", 1_111, 0),
    "dama_train.json": Found("dama/train", 2_409, 2_409),
    "dune/arithmetic.json": Found("dune/arithmetic", 1_065, 1_065),
    "dune/arithmetic_locality.json": Found("dune/arithmetic_locality", 564, 0),
    "dune/new_info.json": Found("dune/new_info", 200, 200),
    "dune/new_info_locality.json": Found("dune/new_info_locality", 207, 0),
    "easyedit_emnlp/counterfact_distracting_neighbor.json": Found("easyedit_locality/distracting", 300, 300),
    "easyedit_emnlp/counterfact_portability_gpt4.json": Found("easyedit_portability/one-hop", 1_031, 1_031),
    "easyedit_emnlp/zsre_inverse_relation.json": Found("easyedit_portability/inverse", 385, 377),
    "easyedit_emnlp/zsre_mend_eval_portability_gpt4.json": Found(
        "easyedit_portability/one-hop", 1_037, 1_008
    ),
    "easyedit_emnlp/zsre_subject_replace.json": Found("easyedit_portability/subject-replace", 293, 261),
    "ecbd_np_easy.json": Found("ecbd/titled", 114, 114),
    "ecbd_specificity.json": Found("ecbd/popular", 40, 40),
    "editeverything.json": Found("editeverything", 552, 552),
    "entity_inferences/disaster_explicit_attribute_independent.json": Found(
        "entity_inferences/titled", 27, 27
    ),
    "entity_inferences/fake_person_explicit_attribute_dependent.json": Found(
        "entity_inferences/titled", 12, 12
    ),
    "entity_inferences/fake_person_implicit_attribute_dependent_adjective.json": Found(
        "entity_inferences/titled", 12, 12
    ),
    "entity_inferences/tv_show_explicit_attribute_dependent.json": Found("entity_inferences/titled", 46, 46),
    "fruit/inputlabels.jsonl": Found("fruit", 3, 3),
    "fruit/test.diff.tfrecords": Found("fruit", 32, 32),
    "halluedit/geography_forest.csv": Found("hallueditbench", 100, 100),
    "halluedit/health_disease.csv": Found("hallueditbench", 100, 100),
    "halluedit/human_writer.csv": Found("hallueditbench", 100, 100),
    "knowedit/ZsRE-test-all.json": Found("knowedit/zsre", 1_304, 1_304),
    "knowedit/blender_test.json": Found("knowedit/convsent", 800, 800),
    "knowedit/recent_train.json": Found("knowedit/recent", 570, 570),
    "knowedit/trivia_qa_train.json": Found("knowedit/sanitation", 80, 80),
    "knowedit/wikibio-test-all.json": Found("knowedit/wikibio", 306, 306),
    "knowedit/wikibio-train-all.json": Found("knowedit/wikibio", 464, 464),
    "me_ppl/ME-PPL_50.json": Found("me_ppl", 50, 0),
    "memit_csk/20q/probe_set.json": Found("commonsense/20q", 379, 379),
    "memit_csk/20q/svo_annotated/edit_validation_set.json": Found("commonsense/20q", 507, 507),
    "memit_csk/pep3k/probe_set.json": Found("commonsense/pep3k", 265, 265),
    "memit_csk/pep3k/svo_annotated/edit_validation_set.json": Found("commonsense/pep3k", 306, 306),
    "mquake/MQuAKE-hard.json": Found("mquake/hard", 215, 215),
    "mquake_prompts/MeLLo-prompt.txt": Found("mquake_prompts/demonstrations", 4, 0),
    "mquake_prompts/cloze_templates.json": Found("mquake_prompts/templates", 44, 0),
    "mquake_prompts/multihop-cot-prompts.txt": Found("mquake_prompts/demonstrations", 5, 0),
    "mquake_prompts/multihop-prompts.txt": Found("mquake_prompts/demonstrations", 1, 0),
    "mquake_prompts/question_templates.json": Found("mquake_prompts/templates", 44, 0),
    "mquake_prompts/rel-prompts.json": Found("mquake_prompts/demonstrations", 37, 0),
    "pararel/trex_lms_vocab/P103.jsonl": Found("pararel", 919, 0),
    "pararel/trex_lms_vocab/P106.jsonl": Found("pararel", 821, 0),
    "pararel/trex_lms_vocab/P176.jsonl": Found("pararel", 925, 0),
    "pararel/trex_lms_vocab/P36.jsonl": Found("pararel", 471, 0),
    "pararel/trex_lms_vocab/P413.jsonl": Found("pararel", 952, 0),
    "pararel_relations.jsonl": Found("pararel", 46, 0),
    "pitfalls/composite_edit.json": Found("pitfalls/composite", 300, 600),
    "pitfalls/easy.json": Found("pitfalls/round", 300, 600),
    "pitfalls/reverse_edit.json": Found("pitfalls/reverse", 300, 600),
    "professions.json": Found("professions", 320, 320),
    "ripple_edits/popular_gpt-j.json": Found("ripple_edits/popular", 355, 355),
    "slag/leap_of_thought_test.jsonl": Found("leapofthought", 500, 500),
    "taxi/edits-evaluation.json": Found("taxi/evaluation", 1_500, 1_500),
    "taxi/edits.json": Found("taxi/edits", 976, 976),
    "unke_v2.json": Found("unke", 1_000, 1_000),
    "wise/hallucination-edit.json": Found("wise/hallucination", 600, 600),
    "wise/temporal-edit.json": Found("wise/temporal", 75, 75),
    "zsre/zsre_mend_train-1k.json": Found("zsre/true", 1_000, 1_000),
    "zsre_dev_kilt.json": Found("zsre_kilt/true", 6_185, 6_185),
}
PATTERNS = "pararel/graphs_json/"
"""39 files of patterns, one a relation."""
NAMED_ALIKE = {"slag/leap_of_thought_test.jsonl": 4}
"""Cases whose id an earlier record has in the file itself."""


def raw(name: str) -> Any:
    """Read a file without the readers under test."""
    text = (DATA / name).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.split("\n") if line]


checked = cache(check)
"""Reads each file once for all tests that look at what it says of the whole file."""


def names() -> set[str]:
    found = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.is_file()}
    return {name for name in found if not name.endswith((".lock.json", "README.md"))}


def test_every_file_is_accounted_for():
    patterns = {name for name in names() if name.startswith(PATTERNS)}
    assert len(patterns) == 39
    assert names() - patterns == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_dataset_variant_and_rows_are_told_by_the_file_alone(name):
    found = checked(DATA / name)
    assert Found(found.name, found.rows, found.cases) == EXPECTED[name]
    assert (found.broken, found.limit, found.malformed) == (None, None, ())
    pairs = 2 if found.dataset == "pitfalls" else 1
    assert found.rows * pairs == found.cases + len(found.skipped)  # a case a row, or a reason
    assert found.renamed == NAMED_ALIKE.get(name, 0)
    assert (found.no_cases is None) == bool(found.cases) and not found.unusable


@pytest.mark.parametrize("name", EXPECTED)
def test_a_renamed_copy_is_the_same(tmp_path, name):
    copy = tmp_path / f"copy{Path(name).suffix}"
    shutil.copyfile(DATA / name, copy)
    dataset, _, _ = EXPECTED[name].name.partition("/")
    assert check(copy, limit=30).name == EXPECTED[name].name
    assert check(f"{dataset}@{copy}", limit=30).name == EXPECTED[name].name


@pytest.mark.parametrize(
    "name", [name for name in EXPECTED if name.endswith((".json", ".jsonl")) and "fruit" not in name]
)
def test_rows_are_those_of_the_file(name):
    """Counted without the readers: the length of a list, or of the lists and columns that a document holds."""
    found, document = checked(DATA / name), raw(name)
    if name.startswith("dune/"):
        assert found.rows == len(document["edits"]) == len(document["test_inputs"])
    elif name.startswith("taxi/"):
        assert found.rows == len(document["subj"])
    elif name == "knowedit/trivia_qa_train.json":
        assert found.rows == len(document["K_F"]) and found.probes["locality"] == len(document["K_R"]) == 453
    elif name.startswith("codeupdatearena/"):
        assert found.rows == 1
    else:
        assert found.rows == len(document)


def test_patterns_of_pararel_make_no_cases():
    for name in names():
        if name.startswith(PATTERNS):
            found = checked(DATA / name)
            assert (found.dataset, found.cases, found.malformed) == ("pararel", 0, ())
            assert found.rows == len(found.skipped) and "wordings without a fact" in str(found.no_cases)


@pytest.mark.parametrize("name", [name for name in EXPECTED if EXPECTED[name].cases])
def test_iterating_gives_what_reading_gives(name):
    assert list(iterate(DATA / name, limit=50)) == read(DATA / name, limit=50).cases


@pytest.mark.parametrize("name", [name for name in EXPECTED if EXPECTED[name].cases])
def test_cases_begin_with_the_request_and_keep_the_rules_of_probes(name):
    for case in iterate(DATA / name):
        dataset = EXPECTED[name].name.partition("/")[0]
        assert case.probes[0].kind in ("efficacy", "long") and case.id.startswith(dataset + ":")
        for probe in case.probes:
            assert probe.prompt.strip()
            assert probe.rival is None or not is_answer(probe.rival, probe.answers)
            assert probe.form != "choice" or set(probe.answers) <= set(probe.choices)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_case_is_shown_or_why_there_is_none(name):
    shown = CliRunner().invoke(app, ["data", "show", str(DATA / name), "--json"])
    if EXPECTED[name].cases:
        assert shown.exit_code == 0 and json.loads(shown.stdout)["request"]["target"]
    else:
        assert shown.exit_code != 0 and "holds no cases" in shown.output + str(shown.exception)


def test_ripple_edits_filtered_by_the_authors():
    """188 tests of Logical Generalisation in these 355 records, 86 of them without an answer; 18 of Preservation."""
    records = raw("ripple_edits/popular_gpt-j.json")
    tests = [test for record in records for test in record["Logical_Generalization"]]
    empty = sum(not query["answers"] for test in tests for query in test["test_queries"])
    found = checked(DATA / "ripple_edits/popular_gpt-j.json")
    assert found.facts["tests"]["logical_generalization"] == len(tests) - empty == 102
    assert found.facts["left out of cases"] == {
        "Logical_Generalization tests without an answer, which the authors' check passes": empty
    }
    assert (found.facts["tests"]["forgetfulness"], found.facts["tests"]["compositionality_2"]) == (18, 0)
    assert all(not record["Forgetfulness"] for record in records)


def test_knowedit_zsre_restates_its_edits():
    found = checked(DATA / "knowedit/ZsRE-test-all.json")
    assert (found.probes["restated"], found.probes["same_subject"]) == (386, 2_608 - 386)
    assert found.facts["locality questions that restate the edited fact"] == 386
    records = raw("knowedit/ZsRE-test-all.json")
    same = sum(record["target_new"] in record["ground_truth"] for record in records)
    assert found.facts["requests whose target is the old answer"] == same == 43


def test_one_zsre_file_gives_portability_and_locality():
    """Rows whose wrong answer is a gold one are left out: 28 as spelled, one more with other capitals."""
    found = checked(DATA / "easyedit_emnlp/zsre_mend_eval_portability_gpt4.json")
    assert found.probes["one_hop"] == found.probes["locality"] == 1_008
    records = raw("easyedit_emnlp/zsre_mend_eval_portability_gpt4.json")
    assert sum(record["alt"] in record["answers"] for record in records) == 28
    assert sum(is_answer(record["alt"], record["answers"]) for record in records) == len(found.skipped) == 29


def test_facts_to_erase_have_their_subjects():
    assert checked(DATA / "knowedit/trivia_qa_train.json").subject_is_prompt == 0


def test_bmikes_translated_subjects():
    """How many Chinese and German requests can be made at all."""
    made = {
        name: check(f"bmike53/other@{DATA / 'bmike53' / name}")
        for name in (
            "mcounterfact_test_enzh-cn.json",
            "mzsre_test_duplicate_enzh-cn.json",
            "wfd_test_ende.json",
        )
    }
    for name, found in made.items():
        rows = raw(f"bmike53/{name}")
        language = next(key for key in rows[0] if key != "en")
        absent = sum(r[language]["subject"].strip().lower() not in r[language]["src"].lower() for r in rows)
        assert found.cases + found.subject_absent + _unchanged(found) == len(rows)
        assert found.subject_absent >= absent


def _unchanged(found: Any) -> int:
    return sum("changes nothing" in fault.reason for fault in found.skipped)


def test_counterfact_edit_contradictions():
    """62 prompts of 9,917 are to be completed in different ways; which cases, counted here from the records."""
    records = raw("counterfact-edit.json")
    targets = defaultdict(set)
    for record in records:
        targets[record["prompt"]].add(record["target_new"])
    torn = [r["case_id"] for r in records if len(targets[r["prompt"]]) > 1]
    whole = Counter((r["prompt"], r["subject"], r["target_new"]) for r in records)
    found = checked(DATA / "counterfact-edit.json")
    assert found.prompts == len(targets) == 9_917
    assert found.conflicts.prompts == sum(len(t) > 1 for t in targets.values()) == 62
    assert found.conflicts.cases == len(torn)
    assert found.conflicts.examples == tuple(f"counterfact_edit:{number}" for number in torn[:10])
    assert found.duplicates == sum(number - 1 for number in whole.values())
    assert found.requests == found.facts["targets of one word"] == 10_000
    assert found.subject_absent == 0


def test_counterfact_plus_from_the_flat_file():
    """Without contradictions, no prompt is left with two targets."""
    found = check(f"counterfact_plus@{DATA / 'counterfact-edit.json'}")
    assert found.probes == {"efficacy": 10_000, "neighbourhood": 10_000, "distracting": 10_000}
    multi = check(f"counterfact_plus/multi@{DATA / 'counterfact-edit.json'}")
    assert multi.conflicts.prompts == 0 and multi.cases + len(multi.skipped) == 10_000
    assert multi.prompts == found.prompts  # of each prompt the first target stays


def test_zsre_kilt_questions():
    records = raw("zsre_dev_kilt.json")
    found = checked(DATA / "zsre_dev_kilt.json")
    types = Counter(record["type"] for record in records)
    assert found.facts == {f"type {kind}": number for kind, number in sorted(types.items())}
    assert all(r["question_id"].startswith(f"{r['type']}-") for r in records)
    assert found.prompts == found.subject_is_prompt == 6_185
    assert len(check(f"zsre_kilt/alt@{DATA / 'zsre_dev_kilt.json'}").skipped) == 6_185


def test_akew_edits_and_hops():
    found = checked(DATA / "akew_mquake_cf.json")
    assert found.requests == found.facts["edits"] == 436
    assert found.facts["relations"] == 31
    assert found.facts["cases by edits"] == {1: 277, 2: 72, 3: 5}
    assert found.facts["cases by hops"] == {2: 139, 3: 138, 4: 77}


def test_editeverything_categories():
    """552 rows in seven categories; ten questions are asked twice."""
    found = checked(DATA / "editeverything.json")
    assert found.facts["rows by category"] == {
        "physics": 221, "biology": 92, "math": 78, "chemistry": 51, "code": 49, "poetry": 31, "news": 30,
    }  # fmt: skip
    assert (found.requests, found.prompts) == (552, 542)


def test_unke_sub_questions():
    found = checked(DATA / "unke_v2.json")
    assert found.probes == {"long": 1_000, "long_paraphrase": 1_000, "sub_question": 4_729}
    assert found.facts["rows by sub-questions"] == {4: 337, 5: 613, 6: 35, 7: 14, 8: 1}
    assert found.facts["mean answer words"] == 91.5


def test_dama_and_professions():
    assert checked(DATA / "dama_train.json").cases == 2_409
    sentences = checked(DATA / "dama_test.json")
    assert (sentences.name, len(sentences.skipped)) == ("dama/test", 1_111)  # they ask for nothing
    assert checked(DATA / "professions.json").cases == 320


def test_ecbd_popular_entities_are_all_asked_about():
    found = checked(DATA / "ecbd_specificity.json")
    assert found == check(f"ecbd/popular@{DATA / 'ecbd_specificity.json'}")
    assert (found.rows, found.probes.get("entity_locality")) == (40, 40)
