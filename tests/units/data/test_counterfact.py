"""CounterFact and the sets made after it, on records of their schema that are made up."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from errata.data._base import Malformed, Record, Skip
from errata.data.reading import check, read
from errata.data.sets import REGISTRY
from errata.errors import DataError

FOLDER = Path(__file__).parents[2] / "fixtures" / "data"
COUNTERFACT = FOLDER / "counterfact.json"
FLAT = FOLDER / "counterfact-edit.json"


def records(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))


def by_kind(case, kind):
    return [probe for probe in case.probes if probe.kind == kind]


def test_every_prompt_becomes_a_probe_of_its_kind():
    loaded = read(COUNTERFACT)
    raw = records(COUNTERFACT)[0]
    case = loaded.cases[0]
    assert case.id == "counterfact:0" == case.request.id
    assert (case.request.subject, case.request.target, case.request.target_old) == (
        "Ada Morrow", "Brightmoor", "Arvella",
    )  # fmt: skip
    assert case.probes[0].kind == "efficacy"
    assert Counter(p.kind for p in case.probes) == {
        "efficacy": 1, "paraphrase": 2, "neighbourhood": 10, "attribute": 10, "generation": 3,
    }  # fmt: skip
    # the unrelated sentence before a paraphrase is part of the published score
    assert [p.prompt for p in by_kind(case, "paraphrase")] == raw["paraphrase_prompts"]
    assert by_kind(case, "paraphrase")[0].prompt.startswith("The shop closes early")


def test_what_must_be_more_probable_than_what():
    """ES and PS: new over old. NS, reversed: old over new. Attribute prompts have the new object already."""
    case = read(COUNTERFACT).cases[0]
    for probe in (case.probes[0], *by_kind(case, "paraphrase")):
        assert (probe.answers, probe.before, probe.rival) == (("Brightmoor",), ("Arvella",), "Arvella")
    for probe in by_kind(case, "neighbourhood"):
        assert (probe.answers, probe.before, probe.rival) == (("Arvella",), ("Arvella",), "Brightmoor")
    for probe in by_kind(case, "attribute"):
        assert (probe.answers, probe.before, probe.rival) == (("Brightmoor",), ("Brightmoor",), "Arvella")
    for probe in by_kind(case, "generation"):
        assert (probe.form, probe.answers, probe.changes) == ("open", (), False)


def test_multi_leaves_out_what_contradicts_an_earlier_record_and_nothing_else():
    """Record 18 gives record 0's subject and relation another object; record 19 repeats record 1."""
    plain, multi = read(COUNTERFACT), read(f"counterfact/multi@{COUNTERFACT}")
    assert plain.check.cases == 20 and not plain.check.skipped
    assert plain.check.duplicates == multi.check.duplicates == 1
    assert multi.check.cases == 19
    assert [fault.where for fault in multi.check.skipped] == ["record 19"]
    assert "contradicts counterfact:0" in multi.check.skipped[0].reason
    # the wording differs, so the prompts alone do not show it
    assert plain.check.conflicts.prompts == 0
    # a second reading begins without memory of the first
    assert read(f"counterfact/multi@{COUNTERFACT}").check.cases == 19


def test_flat_form_has_one_of_each():
    loaded = read(FLAT)
    assert loaded.check.dataset == "counterfact_edit"
    case = loaded.cases[2]
    assert [p.kind for p in case.probes] == ["efficacy", "paraphrase", "neighbourhood"]
    raw = records(FLAT)[2]
    assert case.probes[2].prompt == raw["locality_prompt"]
    assert case.probes[2].answers == case.probes[2].before == (raw["locality_ground_truth"],)
    assert case.probes[2].rival == raw["target_new"]
    # two records with one prompt: 0 and 18; 19 repeats 1
    assert (loaded.check.conflicts.prompts, loaded.check.conflicts.cases) == (1, 2)
    assert loaded.check.conflicts.examples == ("counterfact_edit:0", "counterfact_edit:18")
    assert (loaded.check.duplicates, loaded.check.prompts) == (1, 18)


@pytest.mark.parametrize("path", [COUNTERFACT, FLAT], ids=["authors", "flat"])
def test_distracting_prompts_state_the_edit_first(path):
    cases = read(f"counterfact_plus@{path}").cases
    for case in cases:
        stated = f"{case.request.text} {case.request.target}. "
        plain, told = by_kind(case, "neighbourhood"), by_kind(case, "distracting")
        assert [p.prompt for p in told] == [stated + p.prompt for p in plain] and plain
        assert [(p.answers, p.rival) for p in told] == [(p.answers, p.rival) for p in plain]


def test_counterfact_plus_is_only_had_by_name_and_refuses_other_records():
    assert check(COUNTERFACT).dataset == "counterfact"
    entry = REGISTRY.get("counterfact_plus")
    with pytest.raises(Malformed, match="requested_rewrite"):
        list(entry.cases(Record({"prompt": "x"}, "record 1", 0), ""))


def test_evoke_main_asks_where_the_target_is_wrong():
    loaded = read(FOLDER / "evoke_main.json")
    assert loaded.check.name == "evoke"
    assert loaded.check.probes == {
        "efficacy": 6, "paraphrase": 12, "neighbourhood": 18, "multi_hop": 5, "distracting": 18,
    }  # fmt: skip
    assert loaded.check.facts == {"with multi-hop question": 5}  # record 2 has none
    case = loaded.cases[0]
    hop = by_kind(case, "multi_hop")[0]
    assert (hop.answers, hop.before, hop.rival) == (("the Silver Arve",), (), case.request.target)
    assert by_kind(case, "distracting")[0].prompt.startswith("Ada Morrow was born in Brightmoor. Wren")
    assert by_kind(case, "distracting")[0].answers == ("Arvella",)


def test_evoke_subject_keeps_the_other_relation():
    case = read(FOLDER / "evoke_subject.json").cases[0]
    assert [p.kind for p in case.probes] == ["efficacy", "same_subject"]
    probe = case.probes[1]
    assert (probe.prompt, probe.answers, probe.before, probe.rival) == (
        "Ada Morrow plays the", ("cello",), ("cello",), "Brightmoor",
    )  # fmt: skip


def test_evoke_tells_the_wrong_file():
    found = check(f"evoke/main@{FOLDER / 'evoke_subject.json'}")
    assert (found.cases, len(found.malformed)) == (0, 6)
    assert found.malformed[0].where == "record 1" and "subject file" in found.malformed[0].reason


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"requested_rewrite": {"prompt": "{} is", "subject": "A", "target_new": {}, "target_true": {}}},
         Malformed, "requested_rewrite.target_new.str: expected a text, found nothing"),
        ({"neighborhood_prompts": "x" and [1]}, Malformed, "neighborhood_prompts: expected texts"),
        ({"requested_rewrite": {"prompt": "A is in", "subject": "Nobody", "target_new": {"str": "x"},
                                "target_true": {"str": "y"}}}, Skip, "does not occur in prompt"),
    ],
)  # fmt: skip
def test_faults_are_told_in_words(change, kind, words):
    value = {**records(COUNTERFACT)[0], **change}
    with pytest.raises(kind, match=words) as caught:
        list(REGISTRY.get("counterfact").cases(Record(value, "record 1", 0), ""))
    assert type(caught.value) is kind or kind is Skip


def test_files_are_told_apart_by_their_records():
    for name, dataset in {
        "counterfact.json": "counterfact", "counterfact-edit.json": "counterfact_edit",
        "evoke_main.json": "evoke", "evoke_subject.json": "evoke", "zsre_mend_eval.json": "zsre",
        "zsre_kilt.jsonl": "zsre_kilt", "zsre_dev_kilt.json": "zsre_kilt",
    }.items():  # fmt: skip
        assert check(FOLDER / name).dataset == dataset
        value = (
            json.loads((FOLDER / name).read_text(encoding="utf-8").splitlines()[0])
            if name.endswith("l")
            else records(FOLDER / name)[0]
        )
        assert [n for n in REGISTRY if REGISTRY.get(n).fits(value)] == [dataset]


def test_a_missing_file_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ERRATA_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        read("counterfact/multi")
    for words in (str(tmp_path / "multi_counterfact.json"), "errata data fetch", "baulab", "@PATH"):
        assert words in str(caught.value)
