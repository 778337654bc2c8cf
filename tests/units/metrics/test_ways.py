"""Metrics that only one dataset needs, reached through the command line and a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata.bench.results import read_sealed
from errata.cli.main import app
from errata.data.reading import read
from errata.data.requests import read_cases, write_cases
from errata.evaluation.metrics import bias
from errata.report.card import card
from errata.report.read import read_run
from tests.units.bench.small import document, execute, write_model

BLOCK = {"methods": [{"name": "ft", "settings": {"steps": 2}, "label": "tuned"}], "schedule": "single"}
PROFESSIONS = [
    ["clock_keeper", 0.0, 0.4], ["countess", -0.9, 0.2], ["count", 0.8, 0.7], ["smith", 0.1, -0.5],
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def professions(tmp_path) -> str:
    path = tmp_path / "professions.json"
    path.write_text(json.dumps(PROFESSIONS), encoding="utf-8")
    return f"professions@{path}"


def cell_of(folder: Path) -> dict:
    (cell,) = (cell for cell in read_run(folder).cells if cell.name == "tuned")
    return read_sealed(cell.folder)


def test_slopes_of_bias_come_with_an_evaluation(model, professions):
    words = ["eval", "--model", str(model), "--method", "ft", "--set", "steps=2", "--cases", professions]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    rows = [row for row in report["rows"] if row["protocol"] == bias.NAME]
    assert len(rows) == len(PROFESSIONS) * 11
    entry = report["summary"][f"bias.{bias.NAME}"]
    for side in ("before", "after"):
        factual, stereotype = ([row["detail"][name] for row in rows] for name in bias.COVARIATES)
        expected = bias.slopes([row[side] for row in rows], factual, stereotype)
        assert entry[f"stereotype_{side}"] == pytest.approx(expected.stereotype)
        assert entry[f"factual_{side}"] == pytest.approx(expected.factual)
        assert entry[f"intercept_{side}"] == pytest.approx(expected.intercept)
    assert entry["stereotype_before"] != 0


def test_slopes_of_bias_come_with_a_run(model, professions, tmp_path):
    words = document(model, tmp_path, BLOCK)
    words["runs"][0]["datasets"] = [professions]
    execute(words, tmp_path / "run")
    found = cell_of(tmp_path / "run")
    entry = found["summary"][f"bias.{bias.NAME}"]
    assert (
        found["scores"]["a_s"] == entry["stereotype_after"]
        and found["scores"]["b"] == entry["intercept_after"]
    )
    text = card(read_run(tmp_path / "run") and [read_run(tmp_path / "run")])
    assert "slope of stereotype" in text and "| bias |" in text


def test_covariates_are_kept_in_files_of_cases(professions, tmp_path):
    cases = list(read(professions).cases)
    write_cases(tmp_path / "cases.jsonl", cases)
    back = list(read_cases(tmp_path / "cases.jsonl"))
    assert back == cases and back[0].probes[-1].covariates == (("factual", 0.0), ("stereotype", 0.4))
    broken = json.loads((tmp_path / "cases.jsonl").read_text(encoding="utf-8").splitlines()[0])
    broken["probes"][-1]["covariates"] = {"factual": "much"}
    (tmp_path / "broken.jsonl").write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(Exception, match="covariates must be numbers by name"):
        read_cases(tmp_path / "broken.jsonl")


def test_scores_of_overfitting_come_with_a_run(model, tmp_path):
    """EVOKE: probability of the right answer, of the edit's target where it is wrong, and which is larger."""
    probes = [
        {"kind": "multi_hop", "prompt": "The capital of Ada is", "answers": ["Esk"], "rival": "Merrin"},
        {"kind": "distracting", "prompt": "Ada was born in Merrin. Bo was born in", "answers": ["Tallow"],
         "before": ["Tallow"], "rival": "Merrin"},
    ]  # fmt: skip
    record = {"prompt": "{} was born in", "subject": "Ada", "target": "Merrin", "target_old": "Tallow"}
    (tmp_path / "cases.jsonl").write_text(json.dumps({**record, "probes": probes}), encoding="utf-8")
    execute(document(model, tmp_path / "cases.jsonl", BLOCK), tmp_path / "run")
    found = cell_of(tmp_path / "run")
    for kind, names in (
        ("multi_hop", ("CAP", "DP", "EOS")),
        ("distracting", ("CAP", "DP", "EOS")),
        ("efficacy", ("CAP", "OAP", "AMS")),
    ):
        entry = found["summary"][f"{kind}.probability"]
        numbers = [entry["answer_after"], entry["rival_after"], entry["macro_after"]]
        assert [found["scores"][f"{name}.{kind}"] for name in names] == pytest.approx(
            [100 * n for n in numbers]
        )
    assert found["scores"]["NS+"] == found["scores"]["EOS.distracting"]
