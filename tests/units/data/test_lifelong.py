"""WikiBigEdit and UltraEditBench: long streams of questions."""

from __future__ import annotations

import json

import pytest

from errata.data._base import Malformed, Record, Skip, no_facts
from errata.data.reading import iterate, read
from errata.data.sets import ultraeditbench, wikibigedit


def change(**fields):
    value = {
        "tag": "new",
        "subject": "Ada Penn",
        "relation": "employer",
        "object": "Lutz Clock Works",
        "update": "Who employs Ada Penn?",
        "ans": "Lutz Clock Works",
        "rephrase": "Where does Ada Penn work?",
        "personas": "Arr, whose crew be Ada Penn sailing with?",
        "loc": "Who employs Ada Penz?",
        "loc_ans": "the fair",
        "mhop": "In which town is the employer of Ada Penn?",
        "mhop_ans": "Lutz",
    }
    return value | fields


def triple(**fields):
    value = {
        "prompt": "Who employs Ada Penn?",
        "ans": "Lutz Clock Works",
        "subject": "Ada Penn",
        "rephrase_prompt": "Where does Ada Penn work?",
        "loc": "Who runs the fair?",
        "loc_ans": "M. Gustave",
    }
    return value | fields


def made(dataset, value, variant, index=4):
    assert dataset.fits(value)
    (case,) = dataset.cases(Record(value, f"record {index + 1}", index), variant)
    return case


def test_each_field_of_a_change_has_its_kind():
    case = made(wikibigedit, change(), "20240401_20240501")
    assert case.id == "wikibigedit:20240401_20240501/4"
    assert {probe.kind: (probe.prompt, probe.answers) for probe in case.probes} == {
        "efficacy": ("Who employs Ada Penn?", ("Lutz Clock Works",)),
        "paraphrase": ("Where does Ada Penn work?", ("Lutz Clock Works",)),
        "persona": ("Arr, whose crew be Ada Penn sailing with?", ("Lutz Clock Works",)),
        "multi_hop": ("In which town is the employer of Ada Penn?", ("Lutz",)),
        "locality": ("Who employs Ada Penz?", ("the fair",)),
    }
    assert [probe.kind for probe in case.probes if not probe.changes] == ["locality"]


def test_rows_of_the_authors_runs_read_the_same():
    renamed = change()
    for own, theirs in (("update", "src"), ("ans", "alt"), ("personas", "genv2_mixed")):
        renamed[theirs] = renamed.pop(own)
    assert made(wikibigedit, renamed, "") == made(wikibigedit, change(), "")


def test_a_second_hop_may_be_empty_but_not_half_given():
    kinds = [probe.kind for probe in made(wikibigedit, change(mhop=None, mhop_ans=None), "").probes]
    assert "multi_hop" not in kinds
    with pytest.raises(Malformed, match="mhop, mhop_ans: expected one of each, found 1 and 0"):
        made(wikibigedit, change(mhop_ans=None), "")


def test_every_window_has_its_own_file():
    files = [wikibigedit.DATASET.files[window] for window in wikibigedit.WINDOWS]
    assert len(set(files)) == len(wikibigedit.WINDOWS) == 8
    for name, address in zip(files, wikibigedit.DATASET.urls.values(), strict=True):
        assert address.endswith(f"/{name}")


@pytest.mark.parametrize("dataset", [wikibigedit, ultraeditbench])
def test_streams_keep_no_cases_to_count(dataset):
    assert dataset.DATASET.facts is no_facts


def test_a_stream_is_read_case_by_case(tmp_path):
    path = tmp_path / "stream.json"
    path.write_text(
        json.dumps([change(), change(ans="the fair"), change(subject="Nobody")]), encoding="utf-8"
    )
    assert [case.request.target for case in iterate(path)] == ["Lutz Clock Works", "the fair"]
    check = read(path).check
    assert (check.dataset, check.rows, check.cases, check.subject_absent) == ("wikibigedit", 3, 2, 1)
    assert check.conflicts.prompts == 1


def test_a_triple_becomes_a_case_at_its_subject_or_as_a_whole():
    case = made(ultraeditbench, triple(), "subject")
    assert [probe.kind for probe in case.probes] == ["efficacy", "paraphrase", "locality"]
    assert case.request.subject == "Ada Penn"
    entire = made(ultraeditbench, triple(), "whole")
    assert entire.request.subject == entire.request.text == case.request.text
    assert entire.probes == case.probes


def test_a_triple_without_subject_is_skipped_unless_read_as_a_whole():
    bare = triple()
    del bare["subject"]
    with pytest.raises(Skip, match="names no subject; ultraeditbench/whole"):
        made(ultraeditbench, bare, "subject")
    assert made(ultraeditbench, bare, "whole") == made(ultraeditbench, triple(), "whole")


def test_a_stream_of_lines_is_told_by_its_fields(tmp_path):
    path = tmp_path / "stream.jsonl"
    path.write_text(
        "".join(json.dumps(triple(ans=f"employer {i}")) + "\n" for i in range(3)), encoding="utf-8"
    )
    check = read(path, limit=2).check
    assert (check.dataset, check.variant, check.cases) == ("ultraeditbench", "subject", 2)
