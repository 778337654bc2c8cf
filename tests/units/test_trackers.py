"""Trackers get what a training's log gets, are imported only then, and contact no network unless told to."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

import pytest

import errata
from errata.errors import ConfigError
from errata.training import trackers
from errata.training.loop import TrainingFiles
from tests.models import fresh
from tests.program import errata as program
from tests.theory.test_mend import EXAMPLES

SETTINGS = {"steps": 2, "every": 2, "per_step": 2, "rank": 4, "held_out": 0.3}


class Calls(list):
    """What a module in a tracker's place was called with."""

    def note(self, name: str, result: Any = None) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            print(f"{name} prints where a document of --json would stand")
            self.append((name, args, options))
            return result

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(args, options) for own, args, options in self if own == name]


@pytest.fixture
def calls(request, monkeypatch) -> Calls:
    """A module in the place of the tracker that is asked for."""
    made, module = Calls(), cast(Any, ModuleType(request.param))
    module.__spec__ = ModuleSpec(request.param, None)
    run: Any = ModuleType("run")
    run.log, run.finish = made.note("log"), made.note("finish")
    names = ("log", "finish", "set_experiment", "start_run", "log_params", "log_metrics", "end_run")
    for name in names:
        setattr(module, name, made.note(name))
    module.init = made.note("init", run)
    monkeypatch.setitem(sys.modules, request.param, module)
    for name in ("WANDB_MODE", "MLFLOW_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "unset")
        monkeypatch.delenv(name)
    return made


def train(name: str, **options: Any) -> None:
    files = TrainingFiles(tracker=name, run="ada")
    errata.train(fresh("llama"), method="mend", cases=EXAMPLES, files=files, **{**SETTINGS, **options})


@pytest.mark.parametrize(
    ("calls", "logged", "ended"),
    [("trackio", "log", "finish"), ("wandb", "log", "finish"), ("mlflow", "log_metrics", "end_run")],
    indirect=["calls"],
)
def test_a_tracker_gets_every_step_and_validation(calls, logged, ended, request, capsys):
    name = request.node.callspec.params["calls"]
    train(name)
    printed = capsys.readouterr()
    assert not printed.out and "prints where" in printed.err
    lines = [(options["step"], set(args[0])) for args, options in calls.of(logged)]
    steps, (validated,) = (
        [line for line in lines if "loss" in line[1]],
        [x for x in lines if "loss" not in x[1]],
    )
    assert [step for step, _ in steps] == [1, 2] and validated[0] == 2
    assert steps[0][1] == {"loss", "edit", "locality", "gradient"}
    assert validated[1] == {f"validation/{key}" for key in ("success", "paraphrase", "drawdown", "score")}
    assert all(isinstance(value, float) for args, _ in calls.of(logged) for value in args[0].values())
    if name == "mlflow":
        assert calls.of("start_run") == [((), {"run_name": "ada"})] and calls.of("set_experiment")[0][0] == (
            "errata",
        )
        told = calls.of("log_params")[0][0][0]
        assert told["rank"] == "4" and told["method"] == "mend"
        assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert calls.of(ended) == [(("FINISHED",), {})]
    else:
        ((_, options),) = calls.of("init")
        assert options["project"] == "errata" and options["name"] == "ada" and options["config"]["rank"] == 4
        assert options.get("mode") == {"wandb": "offline"}.get(name)
        assert len(calls.of(ended)) == 1


@pytest.mark.parametrize("calls", ["wandb", "mlflow"], indirect=True)
def test_a_training_that_fails_ends_its_run_as_failed(calls, request, monkeypatch):
    name = request.node.callspec.params["calls"]
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="not finite"):
        train(name, steps=50, learning_rate=1e30, clip=None, every=50)
    if name == "wandb":
        assert calls.of("init")[0][1]["mode"] == "online", "what the user set stays"
        assert calls.of("finish") == [((), {"exit_code": 1})]
    else:
        assert calls.of("end_run") == [(("FAILED",), {})]


def test_a_tracker_that_is_not_known_or_installed_is_refused_before_anything(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        trackers, "find_spec", lambda name: None if name in trackers.TRACKERS else found(name)
    )
    for name, words in (
        ("wandb", "wandb is not installed: pip install 'errata[wandb]'"),
        ("tensorbord", "tracker"),
    ):
        out = tmp_path / "e.safetensors"
        done = program("train", "mend", "--model", "lab", "--quick", "--tracker", name, "-o", out)
        assert done.returncode == 2 and words in done.stderr and not out.exists()
    with pytest.raises(ConfigError, match="errata\\[trackio\\]"):
        train("trackio")


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_itself_keeps_a_run_without_a_network(tmp_path):
    """In a process of its own, whose sockets reach this machine alone."""
    code = (
        "import socket\n"
        "connect = socket.socket.connect\n"
        "def local(self, address):\n"
        "    if self.family != socket.AF_UNIX and address[0] not in ('127.0.0.1', '::1', 'localhost'):\n"
        "        raise AssertionError(f'contacted {address}')\n"
        "    return connect(self, address)\n"
        "socket.socket.connect = local\n"
        "from tests.units.test_trackers import train\n"
        "train('trackio')\n"
        "import json, trackio\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = trackio.Api().runs('errata')\n"
        "print(json.dumps([run.name, run.config['rank'], SQLiteStorage.get_logs('errata', run.name)]))\n"
    )
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "contacted" not in done.stderr
    name, rank, logs = json.loads(done.stdout.strip().splitlines()[-1])
    assert name == "ada" and rank == 4
    assert [line["step"] for line in logs if "loss" in line] == [1, 2]
    assert [line["step"] for line in logs if "validation/score" in line] == [2]
