"""Trainings of several processes: the editor is that of one. Two processes over gloo, started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import errata
from errata.data.requests import write_cases
from errata.edits.artefact import Artefact
from errata.errors import ConfigError
from errata.training import workers
from errata.training.loop import TrainingFiles
from errata.training.workers import ALONE, Workers
from tests.models import fresh
from tests.theory.test_mend import EXAMPLES

BASE = {
    "steps": 4,
    "every": 2,
    "per_step": 4,
    "inside": 1,
    "outside": 1,
    "others": 1,
    "held_out": 0.3,
    "step": 0.3,
}
OWN = {
    "mend": {"rank": 8}, "ke": {"head": 8, "condition": 16}, "malmen": {"rank": 8},
    "rledit": {"rank": 8, "per_step": 4, "length": 2, "reach": 2, "steps": 2},
}  # fmt: skip
HALVES = {"rows": 6}
"""Six prompts at once, three a sample: one process runs the halves of a step one after another, two one each."""
RUNS = {f"{name}-{'bits' if rows else 'rounding'}": (name, {**BASE, **own, **rows})
        for name, own in OWN.items() for rows in (HALVES, {})}  # fmt: skip
SCRIPT = """
import sys
from pathlib import Path
import errata
from errata.cli.main import run
from errata.training.loop import TrainingFiles
from errata.training.workers import joined
from tests.models import fresh
from tests.theory.test_mend import EXAMPLES
from tests.units.test_workers import RUNS

folder = Path(sys.argv[1])
with joined() as group:
    assert group.count == 2
    for name, (method, options) in RUNS.items():
        files = TrainingFiles(log=folder / f"{name}.jsonl")
        made = errata.train(fresh("llama"), method=method, cases=EXAMPLES, files=files, workers=group, **options)
        if group.first:
            made.save(folder / f"{name}.safetensors")
    sys.argv = ["errata", *sys.argv[2:]]
    run()
"""


def words(folder: Path, output: Path) -> list[str]:
    """A training from the command line."""
    settings = {**BASE, **OWN["mend"], **HALVES}
    pairs = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return ["train", "mend", "--model", str(folder / "model"), "--cases", str(folder / "cases.jsonl"), "--json",
            "-o", str(output), "--log", str(output.with_suffix(".log")), *pairs]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """All trainings by two processes, the last from the command line; also what that printed."""
    folder = tmp_path_factory.mktemp("two")
    host = fresh("llama")
    host.model.save_pretrained(folder / "model")
    host.tokenizer.save_pretrained(folder / "model")
    write_cases(folder / "cases.jsonl", EXAMPLES)
    (folder / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(Path(errata.__file__).parents[1]), str(root)])
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--",
         str(folder / "script.py"), str(folder), *words(folder, folder / "cli.safetensors")],
        capture_output=True, text=True, timeout=500, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_the_editor_of_one(name, trained, tmp_path):
    """To the bit where one process sums the same halves; else to what another order of sums rounds to."""
    folder, _ = trained
    method, options = RUNS[name]
    files = TrainingFiles(log=tmp_path / "log.jsonl")
    alone = errata.train(fresh("llama"), method=method, cases=EXAMPLES, files=files, **options)
    two = Artefact.load(folder / f"{name}.safetensors")
    if name.endswith("bits"):
        assert two.digest == alone.digest
    for part, tensor in alone.tensors.items():
        torch.testing.assert_close(two.tensors[part], tensor, atol=2e-5, rtol=2e-4)
    logs = [[json.loads(line) for line in file.read_text().splitlines()]
            for file in (tmp_path / "log.jsonl", folder / f"{name}.jsonl")]  # fmt: skip
    one, other = ([{k: v for k, v in line.items() if k != "seconds"} for line in log] for log in logs)
    assert [line["step"] for line in one] == [line["step"] for line in other], "one process writes the log"
    for a, b in zip(one, other, strict=True):
        for key in a:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5)


def test_from_the_command_line_the_first_process_writes_and_prints(trained, tmp_path):
    folder, printed = trained
    document = json.loads(printed)  # once, by one process
    assert document["digest"] == Artefact.load(folder / "cli.safetensors").digest
    whole = errata.train(
        errata.load(str(folder / "model"), device="cpu"), method="mend", cases=str(folder / "cases.jsonl"),
        **{**BASE, **OWN["mend"], **HALVES},
    )  # fmt: skip
    assert document["digest"] == whole.digest
    assert len((folder / "cli.log").read_text().splitlines()) == 6
    assert not (folder / "cli.safetensors.checkpoint").exists()


def test_shares_are_consecutive_and_whole():
    for count in (1, 2, 3, 5):
        for size in range(8):
            shares = [Workers(rank, count).share(range(size)) for rank in range(count)]
            assert [i for share in shares for i in share] == list(range(size))
            assert max(map(len, shares)) - size / count < 1
    assert ALONE.first and not Workers(1, 2).first


def test_a_method_whose_steps_follow_one_another_is_refused():
    with pytest.raises(
        ConfigError, match="slag is one process's, found 2; methods that share it: ke, malmen, mend"
    ):
        errata.train(fresh("llama"), method="slag", cases=EXAMPLES, workers=Workers(0, 2))


def test_one_process_is_alone_and_keeps_its_device(monkeypatch):
    for name in workers.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with workers.joined() as group:
        assert group == ALONE
    assert workers.device_of("auto") == "auto"
    for name, value in zip(workers.VARIABLES, ("1", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert workers.device_of("auto") == workers.device_of("cuda") == "cuda:1"
    assert workers.device_of("cpu") == "cpu" and workers.device_of("cuda:0") == "cuda:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="no GPU of its own, there are 1"):
        workers.device_of("auto")
