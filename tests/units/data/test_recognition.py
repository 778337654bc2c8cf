"""Telling dataset and variant by the records, and saying so where no record can be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata.cli.main import app
from errata.data._base import Record
from errata.data.reading import check, read
from errata.data.sets import REGISTRY
from errata.data.sets._parts import choice, completion_request, efficacy, locality_probe, rival_to
from errata.errors import ErrataError
from errata.types import Request

FOLDER = Path(__file__).parents[2] / "fixtures" / "data"
ALIASES = ("goalkeeper", "goaltender", "keeper")


def run(*args: str):
    return CliRunner().invoke(app, list(args))


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_a_renamed_copy_is_recognised_the_same(tmp_path, path):
    copy = tmp_path / f"a{path.suffix}"
    shutil.copy(path, copy)
    found, again = check(path), check(copy)
    assert (again.name, again.rows, again.cases) == (found.name, found.rows, found.cases)
    assert check(f"{found.dataset}@{copy}").name == found.name


@pytest.mark.parametrize(
    ("records", "name"),
    [
        ([{"prompt": f"{s} make noise", "label": 0, "subject": s, "verb": "make", "object": "noise"}
          for s in ("goats", "carts", "people", "mills", "towns", "songs", "maps", "bees", "rivers", "locks")], "20q"),
        ([{"prompt": f"{s} makes noise", "label": 1, "subject": s, "verb": "makes", "object": "noise"}
          for s in ("goat", "cart", "man", "mill", "town", "song", "map", "bee", "river", "lock")], "pep3k"),
    ],
)  # fmt: skip
def test_statements_on_kinds_and_on_single_things(tmp_path, records, name):
    path = tmp_path / "edit_validation_set.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    assert check(path).name == f"commonsense/{name}"
    few = tmp_path / "pep3k"
    few.mkdir()
    (few / "probe_set.json").write_text(json.dumps(records[:3]), encoding="utf-8")
    assert check(few / "probe_set.json").name == "commonsense/pep3k"  # too few to say: the name does


def test_mquakes_files_as_far_as_their_records_differ():
    edit = {
        "prompt": "{} lies in",
        "subject": "Kesh",
        "target_new": {"str": "Ruvia"},
        "target_true": {"str": "Brae"},
    }
    chain = {"requested_rewrite": [edit], "questions": [], "new_answer": "", "new_single_hops": []}
    tell = REGISTRY.get("mquake").variants_of
    assert tell is not None
    assert tell([{**chain, "requested_rewrite": [edit] * 4}] * 3) == ("hard",)
    assert tell([chain, {**chain, "requested_rewrite": [edit] * 4}])[0] == "cf"
    assert tell([{**chain, "answer_extended": []}]) == ("t",)
    assert tell([{**chain, "split": "train"}]) == ("remastered",)
    assert tell([chain]) == ("cf", "cf-3k", "cf-3k-v2")  # their names tell these apart, if anything does


@pytest.mark.parametrize(
    ("ids", "popular"),
    [(["A_5928_0_0", "B of C_23533163_1_2"], True), (["A_58134839_4_7", "B_68573407_0_0"], False),
     (["A_5928_0_0", "B_68573407_0_0"], False)],
)  # fmt: skip
def test_popular_entities_are_told_by_the_age_of_their_articles(ids, popular):
    tell = REGISTRY.get("ecbd").variants_of
    assert tell is not None
    found = tell([{"ex_id": name} for name in ids])
    assert ("popular" in found) == popular and ("titled" in found) != popular
    assert tell([{"ex_id": "of no page"}]) == ()


# --- rivals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old", ["goaltender", "Goaltender", " goaltender ", "goal\u00adtender".replace("\u00ad", "")]
)
def test_an_old_answer_that_is_also_an_alias_is_no_rival(old):
    wanted = Request("{} plays as", "Bo Tarn", "goalkeeper", old.strip())
    assert efficacy(wanted, ALIASES).rival is None
    assert rival_to(ALIASES, old) is None
    back = Request("{} plays as", "Bo Tarn", old.strip(), "goalkeeper")  # the same the other way round
    assert efficacy(back, before=ALIASES).rival is None
    assert locality_probe("locality", "He plays as", ALIASES, old).rival is None


def test_rivals_that_differ_stay():
    assert rival_to(ALIASES, "striker") == "striker"
    assert rival_to(("café",), "cafe\u0301") is None  # the same text, decomposed
    assert rival_to(ALIASES, "a goaltender's coach") == "a goaltender's coach"
    assert rival_to(("B",), None) is None


@pytest.mark.parametrize("name", ["mquake", "akew", "knowedit", "zsre"])
def test_the_alias_rule_holds_in_every_set_that_has_aliases(name):
    edit = {
        "prompt": "{} plays as", "subject": "Bo Tarn", "question": "What does Bo Tarn play as?",
        "target_new": {"str": "goalkeeper"}, "target_true": {"str": "goaltender"}, "relation_id": "P413",
        "fact_new_uns": "He keeps goals.",
        "unsfact_triplets_GPT": [{"subject": "He", "prompt": "{} keeps", "target": "x"}],
    }  # fmt: skip
    hop = {"question": edit["question"], "cloze": "", "answer": "goalkeeper", "answer_alias": ["goaltender"]}
    chain = {
        "case_id": 1, "requested_rewrite": [edit], "questions": ["What does he do?"], "answer": "x", "answer_alias": [],
        "new_answer": "y", "new_answer_alias": [], "new_single_hops": [hop],
        "single_hops": [{**hop, "answer": "goaltender", "answer_alias": []}],
    }  # fmt: skip
    facts = {
        "knowedit": {"prompt": "Bo Tarn plays as", "subject": "Bo Tarn", "target_new": "Goaltender",
                     "ground_truth": ["goaltender"], "locality": {"Forgetfulness": []}},
        "zsre": {"src": "What is Bo Tarn?", "subject": "Bo Tarn", "answers": ["goalkeeper", "goaltender"], "alt": "x",
                 "rephrase": "And Bo Tarn?", "loc": "who", "loc_ans": "Ada"},
    }  # fmt: skip
    for variant in REGISTRY.get(name).variants:
        for case in REGISTRY.get(name).cases(Record(facts.get(name, chain), "record 1", 0), variant):
            for probe in case.probes:
                assert probe.rival is None or rival_to(probe.answers, probe.rival) == probe.rival


# --- files of which nothing can be used ----------------------------------------------------------------------


def test_a_file_of_which_every_record_is_malformed_ends_with_an_exit_code(tmp_path):
    """Named as a dataset that it is not; as told by its records, another one is tried first."""
    path = tmp_path / "peak.json"
    shutil.copy(FOLDER / "peak.json", path)
    assert check(path).dataset == "peak"
    for name in ("zsre", "wise", "mquake", "counterfact_edit"):
        found = check(f"{name}@{path}")
        assert found.unusable and not found.cases
        shown = run("data", "check", str(path), "--dataset", name)
        assert shown.exit_code == 1 and "UNUSABLE" in shown.output and "record 1" in shown.output
        assert run("data", "check", str(path), "--dataset", name, "--json").exit_code == 1
    assert run("data", "check", str(path)).exit_code == 0


@pytest.mark.parametrize(
    "change",
    [
        {"neighborhood_prompts": [["Bo Orn was born in", "Sund"]]},
        {"neighborhood_prompts": [["Bo Orn was born in", "Sund"]], "postive_list": ["Sund"]},
        {"neighborhood_prompts": {"Bo Orn was born in": "Sund"}},
        {"neighborhood_prompts": 3},
    ],
)
def test_counterfact_claims_no_records_that_it_cannot_read(change):
    record = json.loads((FOLDER / "counterfact.json").read_text(encoding="utf-8"))[0]
    assert REGISTRY.get("counterfact").fits(record)
    assert not REGISTRY.get("counterfact").fits({**record, **change})


def test_some_malformed_records_are_a_finding_and_no_failure(tmp_path):
    rows = json.loads((FOLDER / "peak.json").read_text(encoding="utf-8"))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([*rows, {**rows[0], "negtive_list": 5}]), encoding="utf-8")
    assert len(check(path).malformed) == 1 and not check(path).unusable
    assert run("data", "check", str(path)).exit_code == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("me_ppl.json", "a text to take the perplexity of"),
        ("mquake_templates.json", "a template for a relation"),
        ("mquake_demonstrations.txt", "demonstrations for MQuAKE's questions"),
        ("dune_new_info_locality.json", "a locality row has no edit"),
        ("mlake_multi.json", "a multi-hop question has no request"),
    ],
)
def test_files_without_cases_say_what_they_are(name, words):
    path = FOLDER / name
    found = check(path)
    assert found.cases == 0 and not found.malformed and len(found.skipped) == found.rows
    assert words in str(found.no_cases)
    shown = run("data", "check", str(path))
    assert shown.exit_code == 0 and "none:" in shown.output
    shown = run("data", "show", str(path))
    assert shown.exit_code != 0 and isinstance(shown.exception, ErrataError | SystemExit)
    assert f"holds no cases: {words}" in shown.output + str(shown.exception)


def test_tables_choices_and_statements_that_cannot_be_taken_apart():
    with pytest.raises(ErrataError, match="none of those to choose from"):
        choice("property", "They move by", "swimming", ("walking", "flying"))
    assert choice("property", "They move by", "walking", ("walking", " walking", "flying")).choices == (
        "walking",
        "flying",
    )
    made = completion_request("Ada Sund leads the Guild")
    assert (made.text, made.target, made.subject) == ("Ada Sund", "leads the Guild", "Ada Sund")
    assert (completion_request("凯什在河边").text, completion_request("凯什在河边").target) == (
        "凯什",
        "在河边",
    )
    with pytest.raises(ErrataError, match="too short"):
        completion_request("A")


def test_a_tfrecord_is_known_by_its_bytes(tmp_path):
    import struct

    from errata.data import _tfrecord

    head = struct.pack("<Q", 0)
    frame = (
        head
        + struct.pack("<I", _tfrecord.masked_crc32c(head))
        + struct.pack("<I", _tfrecord.masked_crc32c(b""))
    )
    for name in ("records", "records.json", "records.txt", "records.tfrecords"):
        (tmp_path / name).write_bytes(frame)
        assert check(tmp_path / name).dataset == "fruit"
    (tmp_path / "other").write_bytes(b"\x00" * 40)
    with pytest.raises(ErrataError, match="of no known format"):
        read(tmp_path / "other")
