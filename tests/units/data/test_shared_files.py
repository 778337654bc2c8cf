"""The real files beside the checkout, where they are: counts as published, or as counted here without the readers."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from errata.data.reading import check, iterate, read
from errata.errors import DataError

DATA = Path(__file__).parents[3].parent / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason="the real data files are not part of the repository and not beside the checkout"
)

EXPECTED: dict[str, tuple[str, int]] = {
    "akew_mquake_cf.json": ("akew", 354),
    "counterfact-edit.json": ("counterfact_edit", 10_000),
    "dama_test.json": ("dama", 1_111),
    "dama_train.json": ("dama", 2_409),
    "ecbd_np_easy.json": ("ecbd", 114),
    "ecbd_specificity.json": ("ecbd", 40),
    "editeverything.json": ("editeverything", 552),
    "entity_inferences/disaster_explicit_attribute_independent.json": ("entity_inferences", 27),
    "entity_inferences/fake_person_explicit_attribute_dependent.json": ("entity_inferences", 12),
    "entity_inferences/fake_person_implicit_attribute_dependent_adjective.json": ("entity_inferences", 12),
    "entity_inferences/tv_show_explicit_attribute_dependent.json": ("entity_inferences", 46),
    "pararel_relations.jsonl": ("pararel", 46),
    "professions.json": ("professions", 320),
    "unke_v2.json": ("unke", 1_000),
    "zsre_dev_kilt.json": ("zsre_kilt", 6_185),
}
NO_RECORDS = ("README.md", "mquake_prompts/")
"""What is no dataset: a note, and MQuAKE's prompts and templates."""


def raw(name: str) -> list[Any]:
    """Read a file without the readers under test."""
    text = (DATA / name).read_text(encoding="utf-8")
    return (
        json.loads(text)
        if text.lstrip()[0] == "["
        else [json.loads(line) for line in text.split("\n") if line]
    )


def test_every_file_is_accounted_for():
    found = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(NO_RECORDS)} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_and_dataset_are_told_by_the_file_alone(name):
    dataset, rows = EXPECTED[name]
    found = check(DATA / name)
    assert (found.dataset, found.rows, found.broken, found.limit) == (dataset, rows, None, None)
    assert found.rows == len(raw(name))
    assert found.rows == found.cases + len(found.skipped)  # one case a row, or a reason
    assert not found.malformed and not found.renamed


@pytest.mark.parametrize("name", EXPECTED)
def test_iterating_gives_what_reading_gives(name):
    assert list(iterate(DATA / name, limit=50)) == read(DATA / name).cases[:50]


@pytest.mark.parametrize("name", EXPECTED)
def test_cases_begin_with_the_request_and_keep_the_rules_of_probes(name):
    for case in read(DATA / name).cases:
        assert case.probes[0].kind in ("efficacy", "long") and case.id.startswith(EXPECTED[name][0] + ":")
        for probe in case.probes:
            assert probe.prompt.strip()
            assert probe.rival is None or probe.rival not in probe.answers
            assert probe.form != "choice" or set(probe.answers) <= set(probe.choices)


@pytest.mark.parametrize("name", ["rel-prompts.json", "cloze_templates.json", "question_templates.json"])
def test_templates_are_no_dataset(name):
    with pytest.raises(DataError, match="fit no dataset"):
        read(DATA / "mquake_prompts" / name)


def test_counterfact_edit_contradictions():
    """62 prompts of 9,917 are to be completed in different ways; which cases, counted here from the records."""
    records = raw("counterfact-edit.json")
    targets = defaultdict(set)
    for record in records:
        targets[record["prompt"]].add(record["target_new"])
    torn = [r["case_id"] for r in records if len(targets[r["prompt"]]) > 1]
    whole = Counter((r["prompt"], r["subject"], r["target_new"]) for r in records)
    found = check(DATA / "counterfact-edit.json")
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
    found = check(DATA / "zsre_dev_kilt.json")
    types = Counter(record["type"] for record in records)
    assert found.facts == {f"type {kind}": number for kind, number in sorted(types.items())}
    assert all(r["question_id"].startswith(f"{r['type']}-") for r in records)
    assert found.prompts == found.subject_is_prompt == 6_185
    assert len(check(f"zsre_kilt/alt@{DATA / 'zsre_dev_kilt.json'}").skipped) == 6_185


def test_akew_edits_and_hops():
    found = check(DATA / "akew_mquake_cf.json")
    assert found.requests == found.facts["edits"] == 436
    assert found.facts["relations"] == 31
    assert found.facts["cases by edits"] == {1: 277, 2: 72, 3: 5}
    assert found.facts["cases by hops"] == {2: 139, 3: 138, 4: 77}


def test_editeverything_categories():
    """552 rows in seven categories; ten questions are asked twice."""
    found = check(DATA / "editeverything.json")
    assert found.facts["rows by category"] == {
        "physics": 221, "biology": 92, "math": 78, "chemistry": 51, "code": 49, "poetry": 31, "news": 30,
    }  # fmt: skip
    assert (found.requests, found.prompts) == (552, 542)


def test_unke_sub_questions():
    found = check(DATA / "unke_v2.json")
    assert found.probes == {"long": 1_000, "long_paraphrase": 1_000, "sub_question": 4_729}
    assert found.facts["rows by sub-questions"] == {4: 337, 5: 613, 6: 35, 7: 14, 8: 1}
    assert found.facts["mean answer words"] == 91.5


def test_dama_and_professions():
    assert check(DATA / "dama_train.json").cases == 2_409
    sentences = check(DATA / "dama_test.json")
    assert (sentences.name, len(sentences.skipped)) == ("dama/test", 1_111)  # they ask for nothing
    assert check(DATA / "professions.json").cases == 320


def test_ecbd_popular_entities_are_all_asked_about():
    found = check(DATA / "ecbd_specificity.json")
    assert found == check(f"ecbd/popular@{DATA / 'ecbd_specificity.json'}")
    assert (found.rows, found.probes.get("entity_locality")) == (40, 40)
