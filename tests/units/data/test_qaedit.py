"""QAEdit: natural questions with their rephrasing and unrelated ones."""

from __future__ import annotations

import json

import pytest

from errata.data._base import Malformed, Record, SubjectAbsent
from errata.data.reading import read
from errata.data.sets import qaedit


def row(**fields):
    value = {
        "id": 17,
        "source": "TQA",
        "prompt": "Who built the Lutz clock tower?",
        "target": "Ada Penn",
        "subject": "Lutz clock tower",
        "rephrase": "By whom was the clock tower of Lutz built?",
        "locality": [
            {"loc": "where is Zubrowka", "loc_ans": "Lutz"},
            {"loc": "who is M. Gustave", "loc_ans": "a host"},
        ],
    }
    return value | fields


def test_a_row_becomes_a_case():
    (case,) = qaedit.cases(Record(row(), "record 1", 0), "")
    assert case.id == "qaedit:TQA-17"
    assert (case.request.text, case.request.target) == ("Who built the Lutz clock tower?", "Ada Penn")
    assert case.request.span == (14, 30)
    assert [probe.kind for probe in case.probes] == ["efficacy", "paraphrase", "locality", "locality"]
    assert case.probes[0].answers == case.probes[1].answers == ("Ada Penn",)
    assert case.probes[2].answers == case.probes[2].before == ("Lutz",)


def test_rows_are_counted_by_source(tmp_path):
    path = tmp_path / "slice.json"
    path.write_text(json.dumps([row(), row(id=18, source="NQ"), row(id=19)]), encoding="utf-8")
    check = read(path).check
    assert check.dataset == "qaedit"
    assert check.facts == {"rows by source": {"NQ": 1, "TQA": 2}}


def test_an_absent_subject_and_a_wrong_field_are_told_apart():
    with pytest.raises(SubjectAbsent):
        list(qaedit.cases(Record(row(subject="Lutz fair"), "record 1", 0), ""))
    for wrong in ({"target": ""}, {"locality": "text"}, {"locality": [{"loc": "where"}]}):
        with pytest.raises(Malformed):
            list(qaedit.cases(Record(row(**wrong), "record 1", 0), ""))
