"""The README is run: its Python block as it stands, and every command it shows."""

from __future__ import annotations

import re
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata import job
from errata.bench import health, runner
from errata.cli.main import app
from errata.lab import MODELS, folder
from errata.methods._method import Workspace

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SLOW = ("errata lab check", "errata lab train")
SERVED = ("errata judge", "errata serve", "errata ui", "errata push")
"""Need a server or are one: tests/units/test_judge.py and tests/units/serve bring them."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line.startswith("errata ")]


def save_time(monkeypatch) -> None:
    """Measure on little text and once: that every command runs does not depend on how much."""
    monkeypatch.setattr(job, "Workspace", partial(Workspace, tokens=20_000))  # of statistics
    monkeypatch.setattr(runner, "TEXTS", 20)  # that perplexity is measured on
    monkeypatch.setattr(health, "PROMPTS", 4)  # continued at a checkpoint


def test_the_readme_opens_with_exactly_two_commands():
    first = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    assert [block for block in first if block.startswith("make")] == ["make demo\nmake test\n"]
    makefile = (ROOT / "Makefile").read_text()
    assert "\ndemo:" in makefile and "\ntest:" in makefile
    assert "make " in (ROOT / ".ci" / "run").read_text()


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_time(monkeypatch)
    assert blocks("python")
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert "Tallow" in capsys.readouterr().out


def test_commands_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    save_time(monkeypatch)
    run = [line for line in commands() if not line.startswith((*SLOW, *SERVED))]
    assert len(run) >= 9
    for line in run:
        result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:], catch_exceptions=False)
        assert result.exit_code == 0, line
    assert {"fix.safetensors", "facts.safetensors"} <= {p.name for p in tmp_path.iterdir()}


def test_every_verb_is_in_the_readme():
    import typer

    verbs = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    shown = {shlex.split(line, comments=True)[1] for line in commands()} | {"demo"}
    assert verbs == shown


@pytest.mark.slow
def test_slow_commands_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in commands():
        if line.startswith(SLOW):
            words = shlex.split(line, comments=True)[1:]
            if "train" in words:
                words += ["--steps", "3"]
            assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0, line
    assert (tmp_path / "out/lab/model/card.json").exists()


@pytest.mark.parametrize("name", MODELS)
def test_the_lab_s_models_are_small_and_whole(name):
    files = [p for p in folder(name).iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 24_000_000
    own = {"model.safetensors", "tokenizer.json", "config.json", "card.json"}
    if name == "lab-vl":  # the decoder and the tokenizer are lab's
        own = {"vision.safetensors", "vision.json", "card.json"}
    assert own <= {p.name for p in files}


def test_the_readme_is_short():
    assert README.count("\n") <= 250
