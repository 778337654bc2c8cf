"""Own files of cases: all that a case can say, every fault with its place, and back again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata import lab
from errata.cli.main import app
from errata.data.reading import read
from errata.data.requests import read_cases, read_requests, write_cases
from errata.errors import RequestError
from errata.types import Case, Probe, Request
from tests.units.data.test_mquake import case as chain

FIXTURES = Path(__file__).parents[2] / "fixtures" / "data"
SHARED = Path(__file__).parents[4] / "shared" / "data"

FIRST = {"prompt": "{} was born in", "subject": "Ada", "target": "Esk"}
SECOND = {
    "prompt": "The river of {} is",
    "subject": "Esk",
    "target": "Lum",
    "target_old": "Arve",
    "id": "two",
}


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def fault(folder: Path, **changes) -> str:
    """Read a case whose one probe has these fields; return what is said against it."""
    probe = {"kind": "hop", "prompt": "Ada is", "answers": ["Esk"], **changes}
    with pytest.raises(RequestError) as caught:
        read_cases(write(folder / "c.jsonl", {**FIRST, "probes": [probe]}))
    return str(caught.value)


# --- reading -----------------------------------------------------------------------------------------------


def test_a_file_says_everything_a_case_can(tmp_path):
    probes = [
        {"kind": "hop", "prompt": "Ada is", "answers": ["Esk", 7], "before": "Oa", "rival": "Oa",
         "group": "hops", "need": "all"},
        {"kind": "plausible", "prompt": "So?", "answers": "yes", "form": "choice", "choices": ["no", "yes"]},
        {"kind": "generation", "prompt": "Ada said", "form": "open"},
    ]  # fmt: skip
    record = {**FIRST, "case": "the case", "also": [SECOND], "efficacy": False, "probes": probes}
    (case,) = read_cases(write(tmp_path / "c.jsonl", record))
    assert case == Case(
        "the case",
        Request("{} was born in", "Ada", "Esk"),
        (
            Probe("hop", "Ada is", ("Esk", "7"), ("Oa",), "Oa", group="hops", need="all"),
            Probe("plausible", "So?", ("yes",), (), form="choice", choices=("no", "yes")),
            Probe("generation", "Ada said", (), (), form="open"),
        ),
        (Request("The river of {} is", "Esk", "Lum", "Arve", "two"),),
    )


def test_a_case_asks_whether_it_took_unless_that_is_refused_or_asked(tmp_path):
    asked = {"kind": "efficacy", "prompt": "Ada's town?", "answers": ["Esk"]}
    path = write(tmp_path / "c.jsonl", FIRST, {**FIRST, "efficacy": False}, {**FIRST, "probes": [asked]})
    plain, silent, own = read_cases(path)
    assert [probe.prompt for probe in plain.probes] == ["Ada was born in"]
    assert silent.probes == ()
    assert [probe.prompt for probe in own.probes] == ["Ada's town?"]
    assert [case.id for case in (plain, silent)] == ["c.jsonl:1", "c.jsonl:2"]


def test_read_as_requests_all_of_a_case_are_there(tmp_path):
    path = write(tmp_path / "c.jsonl", {**FIRST, "case": "x", "also": [SECOND], "probes": []}, FIRST)
    assert [request.target for request in read_requests(path)] == ["Esk", "Lum", "Esk"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "shrt"}, "unknown form 'shrt': did you mean 'short'"),
        ({"form": ["short"]}, "unknown form"),
        ({"need": "most"}, "unknown need 'most'"),
        ({"need": "all"}, "need 'all' applies to a group of probes"),
        ({"group": 3}, "group must be text, found int 3"),
        ({"froup": "g"}, "unknown field 'froup', did you mean 'group'?"),
        ({"form": "choice"}, "missing choices"),
        ({"form": "choice", "choices": ["Oa", "Lum"]}, "the first answer 'Esk' is not among the choices Oa, Lum"),
        ({"choices": ["Esk"]}, "choices belong to form 'choice', found form 'short'"),
        ({"form": "choice", "choices": ["Esk", ""]}, "choices must be texts that are not empty"),
        ({"answers": []}, "missing answers"),
        ({"form": "span", "answers": None}, "missing answers"),
        ({"form": "open", "prompt": ""}, "missing prompt"),
    ],
)  # fmt: skip
def test_faults_of_a_probe_are_told_with_its_place(tmp_path, changes, message):
    text = fault(tmp_path, **changes)
    assert "line 1, probe 1: " + message in text


def test_faults_of_a_record_are_told_all_at_once(tmp_path):
    path = write(
        tmp_path / "c.jsonl",
        {**FIRST, "also": [SECOND, {**FIRST, "target": ""}, 3, {**FIRST, "probes": []}]},
        {**FIRST, "also": {"prompt": "x"}, "case": 7, "efficacy": "no", "probes": 0},
        {**FIRST, "allso": []},
        {**FIRST, "probes": [{"kind": "hop", "prompt": "x", "answers": 0}]},
    )
    with pytest.raises(RequestError) as caught:
        read_cases(path)
    text = str(caught.value)
    for part in (
        "line 1, also 2: target is empty", "line 1, also 3: expected a record", "line 1, also 4: unknown field",
        "line 2: also must be a list, found dict", "line 2: case must be text, found int 7",
        "line 2: efficacy must be true or false, found 'no'", "line 2: probes must be a list, found int",
        "line 3: unknown field 'allso', did you mean 'also'?",
    ):  # fmt: skip
        assert part in text, part
    assert "line 4" not in text  # zero is an answer


# --- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_every_dataset_can_be_a_file_of_ones_own(tmp_path, name):
    loaded = read(FIXTURES / name)
    cases = loaded.cases
    if loaded.check.no_cases:  # a file of texts, prompts or questions for other cases
        with pytest.raises(RequestError, match="no cases to write"):
            write_cases(tmp_path / "own.jsonl", cases)
        return
    assert write_cases(tmp_path / "own.jsonl", cases) == len(cases)
    assert read_cases(tmp_path / "own.jsonl") == cases
    assert read(tmp_path / "own.jsonl").cases == cases  # the file is known as cases


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data files are not beside the checkout")
@pytest.mark.parametrize(
    "name",
    ["akew_mquake_cf.json", "dama_train.json", "ecbd_specificity.json", "editeverything.json",
     "entity_inferences/tv_show_explicit_attribute_dependent.json", "professions.json", "unke_v2.json"],
)  # fmt: skip
def test_so_can_the_real_files(tmp_path, name):
    cases = read(SHARED / name, limit=200).cases
    write_cases(tmp_path / "own.jsonl", cases)
    assert read(tmp_path / "own.jsonl").cases == cases


def test_chains_and_the_labs_cases_too(tmp_path):
    cases = [chain(), *lab.cases(3)]
    write_cases(tmp_path / "own.jsonl", cases)
    assert read_cases(tmp_path / "own.jsonl") == cases
    assert len(read_requests(tmp_path / "own.jsonl")) == 5


def test_odd_characters_stay(tmp_path):
    text = 'line\u2028 "quoted" \\ \U0001f600 whole\r\n\x85'
    case = Case("é", Request("{} is", "Ada", text), (Probe("efficacy", "Ada is", (text,), ()),))
    write_cases(tmp_path / "own.jsonl", [case])
    assert read_cases(tmp_path / "own.jsonl") == [case]
    with pytest.raises(RequestError, match="half a surrogate pair"):  # no character, so no answer
        write_cases(tmp_path / "half.jsonl", [replace(case, request=Request("{} is", "Ada", "\ud83d"))])
    assert not (tmp_path / "half.jsonl").exists()
    plain = replace(case, request=Request("{} is", "Ada", "Zoë"), probes=())
    write_cases(tmp_path / "own.jsonl", [plain])
    assert "Zoë" in (tmp_path / "own.jsonl").read_text(encoding="utf-8")  # to be read by people


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case("c", Request("{} is", "Ada", "Esk", ""), ()), "request would change"),
        (Case("", Request("{} is", "Ada", "Esk"), ()), "id would change"),
        (Case("c", Request("{} is", "Ada", "Esk"), (Probe("k", "p", ("",), ()),)), "probe 1: answers must be"),
        (Case("c", Request("{} is", "Ada", "Esk"), (Probe("k", "p", ("a",), (), group=""),)), "probes would change"),
    ],
)  # fmt: skip
def test_what_would_be_read_otherwise_is_not_written(tmp_path, case, message):
    path = write(tmp_path / "own.jsonl", FIRST)
    before = path.read_bytes()
    good = Case("g", Request("{} is", "Ada", "Esk"), ())
    with pytest.raises(RequestError, match=message):
        write_cases(path, [good, case])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path):
    good = Case("g", Request("{} is", "Ada", "Esk"), ())
    for path, message in (
        (tmp_path / "own.json", "expected a name FILE.jsonl"),
        (tmp_path / "none" / "own.jsonl", "there is no folder"),
        (write(tmp_path / "file") / "own.jsonl", "there is no folder"),
    ):
        with pytest.raises(RequestError, match=message):
            write_cases(path, [good])
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(RequestError, match="cannot write"):
        write_cases(tmp_path / "folder.jsonl", [good])
    with pytest.raises(RequestError, match="no cases"):
        write_cases(tmp_path / "own.jsonl", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.jsonl"]


def test_the_command_exports_and_says_what_was_left_out(tmp_path):
    source, target = FIXTURES / "zsre_mend_eval.json", tmp_path / "own.jsonl"
    loaded = read(source)
    said = CliRunner().invoke(app, ["data", "export", str(source), str(target), "--json"])
    assert said.exit_code == 0, said.output
    told = json.loads(said.stdout)
    assert told["cases"] == len(loaded.cases) and told["probes"] == sum(loaded.check.probes.values())
    assert told["left_out"] == len(loaded.check.skipped) + len(loaded.check.malformed) > 0
    again = read(target)
    assert again.cases == loaded.cases and again.check.sha256 == told["sha256"]
    lines = CliRunner().invoke(app, ["data", "export", f"{source}:2", str(target), "--force"]).stdout
    assert f"{target}: 2 cases" in lines.replace("\n", "")
