"""People count requests from 1, in every verb; ids go before numbers; what is taken out is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import errata
from errata.cli.main import app
from errata.edits import Provenance, WeightEdit
from errata.edits.algebra import find_request
from errata.edits.records import Record
from errata.errors import EditError

FACTS = [
    ("{} was born in", "Ada Brenner", "Tallow"),
    ("{} plays the", "Bruno Holner", "harp"),
    ("{} is headquartered in", "Nova Trading", "Merrin"),
]


def solved(*ids: str | None, shared: bool = False) -> WeightEdit:
    """An edit of three requests that can be solved again."""
    generator = torch.Generator().manual_seed(0)
    keys, wanted = torch.randn(6, 3, generator=generator), torch.randn(4, 3, generator=generator)
    names = ids or (None, None, None)
    requests = tuple(errata.Request(*fact, id=name) for fact, name in zip(FACTS, names, strict=True))
    groups = ((0, 1), (0, 1), (2,)) if shared else ((0,), (1,), (2,))
    record = Record(keys, wanted, keys.clone(), 1.0, "plain", groups)
    provenance = Provenance("memit", requests, {}, "0" * 16, versions={"errata": "0"})
    return WeightEdit({"a.weight": record.delta()}, frozenset(), provenance, {"a.weight": record})


def run(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output
    return done.stdout


def shown(path: Path) -> dict[str, str]:
    """The number that ``errata show`` gives each subject."""
    lines = [line.split() for line in run("show", str(path)).splitlines()]
    return {
        s: words[0] for _, s, _ in FACTS for words in lines if s.split()[0] in words and words[0].isdigit()
    }


@pytest.mark.parametrize("ids", [(), ("ada", None, "nova"), ("x", "y", "z")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_number_that_is_shown_is_the_number_that_is_taken_out(tmp_path, ids, place):
    path, out = solved(*ids).save(tmp_path / "e.safetensors"), tmp_path / "r.safetensors"
    subject = FACTS[place][1]
    number = shown(path)[subject]
    assert number == str(place + 1)
    text = run("retract", str(path), "--request", number, "-o", str(out))
    assert f"removed request {number}" in text and subject in text
    left = [request.subject for request in errata.Edit.load(out).provenance.requests]
    assert left == [s for _, s, _ in FACTS if s != subject]
    document = json.loads(run("retract", str(path), "-r", number, "-o", str(out), "--force", "--json"))
    assert [(one["number"], one["subject"]) for one in document["retracted"]] == [(place + 1, subject)]
    # the table of what is left counts as show does from now on
    rows = [line.split()[0] for line in text.splitlines() if any(s.split()[0] in line for s in left)]
    assert rows[-2:] == ["1", "2"] and sorted(shown(out).values()) == ["1", "2"]


def test_an_id_goes_before_a_number_and_that_is_told(tmp_path):
    path, out = solved("3", None, "1").save(tmp_path / "e.safetensors"), tmp_path / "r.safetensors"
    text = run("retract", str(path), "-r", "3", "-o", str(out))
    assert "'3' is taken as the id of request 1, not as number 3" in text and "Ada Brenner" in text
    document = json.loads(
        run("retract", str(path), "-r", "2", "-r", "1", "-o", str(out), "--force", "--json")
    )
    assert [one["subject"] for one in document["retracted"]] == ["Bruno Holner", "Nova Trading"]
    assert document["notes"] == ["'1' is taken as the id of request 3, not as number 1"]
    assert find_request(solved("1", "2", "3"), "2") == (1, None), "the same request either way"


@pytest.mark.parametrize("name", ["0", "4", "-1", "1.0", "", "nobody", "²", "1" * 50])
def test_what_names_no_request_is_refused_with_those_there_are(tmp_path, name):
    with pytest.raises(
        EditError, match=r"no request .* 1 \('ada'\), 2, 3: give an id, or a number from 1 to 3"
    ):
        find_request(solved("ada", None, None), name)


def test_whole_numbers_in_python_are_indices():
    edit = solved("ada", None, None)
    assert errata.retract(edit, 0).provenance.requests == edit.provenance.requests[1:]
    assert errata.retract(edit, ["ada", 2]).provenance.requests == edit.provenance.requests[1:2]
    with pytest.raises(EditError, match="no request 3 counted from 0"):
        errata.retract(edit, 3)
    with pytest.raises(
        EditError, match="2 requests have the id 'a', their numbers in the command line are 1, 3;"
    ):
        errata.retract(solved("a", "b", "a"), "a")
    assert "0 is" in (errata.retract.__doc__ or "")


def test_requests_that_go_together_are_named_as_people_count():
    with pytest.raises(EditError, match=r"requests 1, 2 \(counted from 1\) share one target value"):
        errata.retract(solved(shared=True), 0)
