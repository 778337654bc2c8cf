"""An evaluation with a run folder is continued where it stopped, and gives the numbers of one in a single piece."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import errata
from errata.bench import results
from errata.bench.jobs import Jobs, new_owner
from errata.cli.main import app
from errata.errors import ConfigError, DataError
from errata.job import Job
from errata.report.read import read_run
from errata.types import Case, Corpus, Probe
from tests.models import fresh

TEXTS = Corpus("mine", lambda: ["Ada lives in Esk and was born in Tallow, which lies by the sea."])
NAMES = ("Ada", "Bruno", "Clara", "Dario")


def case(name: str) -> Case:
    request = errata.Request("{} was born in", name, "Esk", "Merrin", name)
    return Case(name, request, (Probe("efficacy", request.text, ("Esk",), ("Merrin",)),))


CASES = [case(name) for name in NAMES]
SHORT = {"max_new_tokens": 4}
"""Random models do not end their answers."""


@pytest.fixture(scope="module")
def host():
    return fresh("llama")


def stop_after(monkeypatch, count: int) -> None:
    """Interrupt the first write of rows after ``count`` of them."""
    append, calls = results.Journal.append, []

    def interrupted(self, *records):
        calls.append(records)
        if len(calls) > count:
            raise KeyboardInterrupt
        append(self, *records)

    monkeypatch.setattr(results.Journal, "append", interrupted)


def count_fits(monkeypatch) -> list[int]:
    fit, sizes = Job.fit, []
    monkeypatch.setattr(Job, "fit", lambda *given, **more: sizes.append(len(given[1])) or fit(*given, **more))
    return sizes


def numbers(report):
    """All of a report but times."""
    points = [replace(point, fit_seconds=0.0) for point in report.checkpoints]
    return report.rows, report.summary, points, report.meta.get("perplexity_of"), report.meta["cases"]


@pytest.mark.parametrize(
    ("options", "lines", "fits"),
    [
        ({"method": "ft"}, 2, [1, 1]),
        (
            {"method": "ft", "schedule": "batch:2"},
            4,
            [2],
        ),  # one of two groups is saved, and a case of the other
        ({"method": "ft", "schedule": "sequential:1", "at": [2]}, 4, [1, 1]),  # after a checkpoint at 2 edits
        ({"method": "ft", "schedule": "sequential:1", "at": [2]}, 1, [1, 1, 1, 1]),  # before it
        ({"edit": True}, 3, []),
    ],
)
def test_it_continues_after_the_last_saved_case(options, lines, fits, host, tmp_path, monkeypatch):
    run = {**options, **SHORT, "corpus": TEXTS, **({} if "edit" in options else {"steps": 2})}
    if "edit" in options:
        run["edit"] = errata.edit(host, CASES[0].request, method="ft", steps=2)
    whole = errata.evaluate(host, CASES, run_folder=tmp_path / "whole", **run)
    place = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, lines)
        with pytest.raises(KeyboardInterrupt):
            errata.evaluate(host, CASES, run_folder=place, **run)
    sizes = count_fits(monkeypatch)
    resumed = errata.evaluate(host, CASES, run_folder=place, **run)
    assert sizes == fits and numbers(resumed) == numbers(whole) and resumed.meta["weights_restored"]
    (cell,), (expected,) = read_run(place).cells, read_run(tmp_path / "whole").cells
    assert cell.status == "done" and cell.summary == expected.summary and cell.cases == len(CASES)
    again = errata.evaluate(host, CASES, run_folder=place, **run)
    assert sizes == fits and numbers(again) == numbers(whole), "a finished one is only read"


def test_a_folder_of_other_settings_is_refused(host, tmp_path):
    run = {"method": "ft", "steps": 1, "run_folder": tmp_path / "run"}
    errata.evaluate(host, CASES[:2], **run)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    for change, message in [
        ({"seed": 1}, "seed: was 0, is 1"),
        ({"steps": 2}, r"settings\.steps: was 1, is 2"),
        ({"schedule": "batch:2"}, "schedule: was 'single', is 'batch:2'"),
        ({"max_new_tokens": 3}, r"asking\.max_new_tokens: was 24, is 3"),
        ({"template": "question"}, r"asking\.template: was "),
        ({"corpus": TEXTS}, "corpus: was None, is 'mine'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            errata.evaluate(host, CASES[:2], **{**run, **change})
    with pytest.raises(ConfigError, match="cases: was "):
        errata.evaluate(host, CASES, **run)
    with pytest.raises(ConfigError, match="model: was "):
        errata.evaluate(fresh("gpt2"), CASES[:2], **run)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json*")} == files


def test_a_folder_that_is_in_use_is_refused(host, tmp_path, monkeypatch):
    run = {"method": "ft", "steps": 1, **SHORT, "run_folder": tmp_path / "run"}
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            errata.evaluate(host, CASES[:2], **run)
    table, owner = Jobs(tmp_path / "run" / results.JOBS), new_owner()
    assert table.take(owner, ["eval"]) == "eval", "an interrupted one is open again"
    with pytest.raises(DataError, match="another process"):
        errata.evaluate(host, CASES[:2], **run)
    table.release("eval", owner)
    assert len(errata.evaluate(host, CASES[:2], **run).rows) > 0


def test_damaged_rows_of_a_finished_one_are_measured_again(host, tmp_path, monkeypatch):
    run = {"method": "ft", "steps": 1, **SHORT, "run_folder": tmp_path / "run"}
    whole = errata.evaluate(host, CASES[:2], **run)
    (rows,) = tmp_path.rglob("rows.jsonl")
    rows.write_text(rows.read_text().splitlines(keepends=True)[0])
    sizes = count_fits(monkeypatch)
    assert numbers(errata.evaluate(host, CASES[:2], **run)) == numbers(whole) and sizes == [1, 1]


def test_the_command_continues(tmp_path):
    saved = fresh("llama")
    saved.model.save_pretrained(tmp_path / "model")
    saved.tokenizer.save_pretrained(tmp_path / "model")
    cases = tmp_path / "cases.jsonl"
    line = {"prompt": "{} was born in", "target": "Esk", "target_old": "Merrin"}
    cases.write_text("".join(json.dumps({**line, "subject": name, "id": name}) + "\n" for name in NAMES[:2]))
    words = ["eval", "--cases", str(cases), "--model", str(tmp_path / "model"), "--method", "ft", "--set", "steps=1",
             "--schedule", "sequential:1", "--keep-edit", str(tmp_path / "e.safetensors"),
             "--run-folder", str(tmp_path / "run"), "--json"]  # fmt: skip
    first, second = (CliRunner().invoke(app, words, catch_exceptions=False) for _ in range(2))
    assert json.loads(first.stdout)["rows"] == json.loads(second.stdout)["rows"]
    (tmp_path / "e.safetensors").unlink()
    third = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "without its edit" in third.stderr and not (tmp_path / "e.safetensors").exists()
