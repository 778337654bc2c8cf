"""A recipe on another model than its own, and models that score no running text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from errata.bench import recipe
from errata.bench.schedule import Schedule
from errata.cli.main import app
from errata.errors import ConfigError
from errata.host.build import new_model, new_tokenizer
from errata.lab.train import TrainConfig
from tests.models import TEXTS
from tests.units.bench import small


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random T5 of the lab's form, which knows nothing."""
    place = tmp_path_factory.mktemp("t5")
    tokenizer = new_tokenizer(TEXTS, 400, kind="encoder_decoder")
    sizes: dict[str, Any] = {"layers": 2, "width": 32, "inner": 64, "heads": 2, "vocab_size": 400}
    settings = TrainConfig.of("t5", **sizes).model_settings(0, 1, 2)
    model: Any = new_model("t5", settings, seed=0, kind="encoder_decoder")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def document(outcome: Any) -> dict[str, tuple[str, str]]:
    assert outcome.exit_code == 0, outcome.output
    return {cell["id"]: (cell["status"], cell["reason"]) for cell in json.loads(outcome.stdout)["cells"]}


def test_the_surveys_t5_columns_run_on_any_t5_folder(root, folder, tmp_path, monkeypatch):
    """As shipped, but for the number of cases; the published figures stand beside."""
    words = yaml.safe_load((root / "recipes" / "easyedit-emnlp2023-t5.yaml").read_text(encoding="utf-8"))
    file = root / "tests" / "fixtures" / "data" / "zsre_mend_eval.json"
    words["runs"][0]["datasets"] = [f"zsre/alt@{file}:2"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(words))
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "recipe.yaml", "-o", "out", "--model", str(folder), "--json"]
    cells = document(CliRunner().invoke(app, arguments, catch_exceptions=False))
    states = {name: state for name, (state, _) in cells.items()}
    assert any("-ft-l-" in name for name in states)
    assert all(state == "done" for name, state in states.items() if "-in_prompt-" not in name), cells
    run = json.loads(Path("out/run.json").read_text(encoding="utf-8"))
    assert run["recipe"]["models"][0]["name"] == str(folder)
    assert [table["name"] for table in run["published"]] == words["published"]
    shown = CliRunner().invoke(app, ["report", "out", "--markdown", "card.md"], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    assert "20.71" in Path("card.md").read_text(encoding="utf-8")


def test_several_edits_are_not_measured_where_no_running_text_is_scored(folder, tmp_path):
    cases = small.write_cases(tmp_path / "cases.jsonl", 2)
    outcome = small.execute(
        small.document(folder, cases, {"methods": [{"name": "ft", "settings": {"steps": 1}}], "schedule": "batch:2"}),
        tmp_path / "out", only="ft-steps",
    )  # fmt: skip
    (job,) = [job for job in outcome.jobs if job.state != "open"]
    assert job.state == "refused" and "running text" in (job.reason or "")


def test_another_model_takes_the_place_of_the_only_one():
    words = {"name": "x", "models": [{"name": "a/b", "dtype": "float32"}],
             "runs": [{"methods": ["rome"], "datasets": ["lab:2"]}]}  # fmt: skip
    made = recipe.on_model(recipe.parse(words), "here/b")
    (model,) = made.models
    assert (model.name, model.label, model.dtype) == ("here/b", "here/b", "float32")
    assert made.runs[0].schedule == Schedule.parse("single")
    with pytest.raises(ConfigError, match="has 2: a, b"):
        recipe.on_model(recipe.parse({**words, "models": ["a", "b"]}), "c")
