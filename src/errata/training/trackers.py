"""Trackers of experiments that get the lines of a training's log as well: trackio, Weights & Biases, MLflow.

Each is an extra that is imported only when it is asked for. None contacts a network unless its own settings say so:
Weights & Biases runs offline unless WANDB_MODE says otherwise, MLflow writes to this machine unless MLFLOW_TRACKING_URI
names a server, trackio writes to this machine.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from errata.errors import ConfigError
from errata.registry import unknown

PROJECT = "errata"
"""Under which runs are filed."""
LONGEST = 500
"""Characters of a setting that MLflow takes."""


@dataclass(frozen=True)
class Tracker:
    """A run of a tracker that is open."""

    add: Callable[[Mapping[str, float], int], Any]
    """Takes numbers by name, and the step that they belong to."""
    close: Callable[[bool], Any]
    """Ends the run; whether the training came to its end."""


def check_tracker(name: str) -> None:
    """Raise ConfigError for a tracker that is not known, or not installed."""
    if name not in TRACKERS:
        raise ConfigError(unknown(name, list(TRACKERS), "tracker"))
    if find_spec(name) is None:
        raise ConfigError(f"{name} is not installed: pip install 'errata[{name}]'")


def open_tracker(name: str, run: str, settings: Mapping[str, Any]) -> Tracker:
    """Begin a run with a name and settings as plain data; what trackers print goes to stderr.

    Raises ConfigError as :func:`check_tracker`.
    """
    check_tracker(name)
    with redirect_stdout(sys.stderr):
        own = TRACKERS[name](run, settings)
    return Tracker(_aside(own.add), _aside(own.close))


def _aside(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*arguments: Any) -> Any:
        with redirect_stdout(sys.stderr):
            return call(*arguments)

    return called


def _trackio(run: str, settings: Mapping[str, Any]) -> Tracker:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    module: Any = importlib.import_module("trackio")
    module.init(project=PROJECT, name=run, config=dict(settings))
    return Tracker(lambda facts, step: module.log(dict(facts), step=step), lambda _: module.finish())


def _wandb(run: str, settings: Mapping[str, Any]) -> Tracker:
    module: Any = importlib.import_module("wandb")
    mode = os.environ.get("WANDB_MODE", "offline")
    opened = module.init(project=PROJECT, name=run, config=dict(settings), mode=mode)
    return Tracker(
        lambda facts, step: opened.log(dict(facts), step=step),
        lambda ended: opened.finish(exit_code=0 if ended else 1),
    )


def _mlflow(run: str, settings: Mapping[str, Any]) -> Tracker:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    module: Any = importlib.import_module("mlflow")
    module.set_experiment(PROJECT)
    module.start_run(run_name=run)
    module.log_params({name: str(value)[:LONGEST] for name, value in settings.items()})
    return Tracker(
        lambda facts, step: module.log_metrics(dict(facts), step=step),
        lambda ended: module.end_run("FINISHED" if ended else "FAILED"),
    )


TRACKERS: Mapping[str, Callable[[str, Mapping[str, Any]], Tracker]] = {
    "trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow,
}  # fmt: skip
"""What opens a run, by the tracker's name, which is that of its package and of the extra."""
