"""errata train, killed at a moment it does not know of, and resumed to the editor of a training that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import errata
from errata.data.requests import write_cases
from errata.edits.artefact import Artefact
from tests.models import fresh
from tests.program import errata as program
from tests.theory.test_mend import EXAMPLES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX's")
PATIENCE = 240
"""Seconds in which a training must come to the step that it is killed in."""


def killed(words: list[str], log: Path, step: int, wait: float) -> None:
    """Start a training in a process of its own, and kill it some seconds after its log has a step."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from errata.cli.main import run; run()", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(errata.__file__).parents[1])},
    )  # fmt: skip
    end = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < end and step not in steps_of(log):
        time.sleep(0.005)
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()


def steps_of(log: Path) -> list[int]:
    """Return the steps whose losses a log has whole."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [line["step"] for line in map(json.loads, lines) if "loss" in line]


def check(words: list[str], folder: Path, steps: list[int], last: int) -> None:
    """Train in one go; train again, killed in some steps and resumed each time; compare."""
    whole, path, log = (folder / name for name in ("whole.safetensors", "e.safetensors", "log.jsonl"))
    done = program(*words, "-o", whole)
    assert done.returncode == 0, done.stderr
    digest, again = json.loads(done.stdout)["digest"], [*words, "-o", str(path), "--log", str(log)]
    for number, step in enumerate(steps):
        killed([*again, *(["--resume"] if number else [])], log, step, random.uniform(0, 0.05))
        assert not path.exists(), "an unfinished training leaves nothing at its output"
        assert step in steps_of(log) and last not in steps_of(log)
    checkpoint = path.with_name(f"{path.name}.checkpoint")
    assert checkpoint.exists()
    done = program(*again, "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["digest"] == digest == Artefact.load(path).digest, f"killed in {steps}"
    assert steps_of(log) == list(range(1, last + 1)), "every step is in the log once"
    assert not checkpoint.exists()


def test_a_training_that_was_killed_ends_with_the_same_editor(tmp_path):
    host, cases, last = fresh("llama"), tmp_path / "cases.jsonl", 60
    host.model.save_pretrained(tmp_path / "model")
    host.tokenizer.save_pretrained(tmp_path / "model")
    write_cases(cases, EXAMPLES)
    settings = {"steps": last, "every": 5, "patience": last, "per_step": 2, "rank": 8, "held_out": 0.3}
    words = ["train", "mend", "--model", str(tmp_path / "model"), "--cases", str(cases), "--quick", "--json"]
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    check(words, tmp_path, [random.randint(6, 25)], last)


@pytest.mark.slow
def test_the_lab_s_short_training_survives_two_kills(tmp_path):
    """Of 20 steps with a checkpoint every 5, at random ones."""
    words = ["train", "mend", "--model", "lab", "--cases", "lab:train", "--quick", "--json"]
    check(words, tmp_path, sorted(random.sample(range(5, 20), 2)), 20)
