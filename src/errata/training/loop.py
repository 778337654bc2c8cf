"""A training loop that is stopped and resumed to the same bits, for networks that learn to edit.

What a step draws depends on the seed and the step's number alone, so that a checkpoint is the network, its best state
so far, the optimiser's, and a few numbers. No checkpoint is written of numbers that are not finite. Of several
processes that train together, all take the same steps, and the first one writes.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from errata import files
from errata.edits import format as file_format
from errata.errors import ConfigError, DataError, EditError
from errata.progress import OnProgress, ignore
from errata.training.trackers import Tracker, open_tracker
from errata.training.workers import ALONE, Workers

KIND = "training"
"""How a checkpoint's header calls itself."""


@dataclass(frozen=True)
class TrainingFiles:
    """What a training leaves on the disk."""

    checkpoint: Path | None = None
    """Where its state is kept; None: nowhere."""
    resume: bool = False
    """Whether to go on from the checkpoint, where there is one."""
    log: Path | None = None
    """JSON lines: one a step, one a validation."""
    tracker: str | None = None
    """Name of a tracker that gets these lines too, see :mod:`errata.training.trackers`."""
    run: str = "training"
    """What the tracker calls the training."""


NO_FILES = TrainingFiles()


@dataclass(frozen=True)
class Loop:
    """Settings of the loop."""

    steps: int
    per_step: int
    """Examples in a step."""
    clip: float | None
    """Largest norm of a step's gradient; None: any."""
    warmup: int
    """Steps over which the rates rise to what they are."""
    decay: Literal["none", "cosine"]
    """Rates afterwards: as they are, or falling to nothing along half a cosine."""
    every: int
    """Steps from one validation, and checkpoint, to the next."""
    patience: int
    """Validations in a row without a gain that end training."""

    def factor(self, step: int) -> float:
        """Return what the rates are multiplied by in a step."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.decay == "none":
            return rise
        return (
            rise
            * 0.5
            * (1 + float(torch.cos(torch.tensor(torch.pi * step / self.steps, dtype=torch.float64))))
        )

    def chosen(self, step: int, count: int, seed: int) -> list[int]:
        """Return the examples of a step: each of ``count`` once in every pass over them, in an order of its own."""
        places = range(step * self.per_step, (step + 1) * self.per_step)
        orders = {turn: _order(turn, count, seed) for turn in {place // count for place in places}}
        return [orders[place // count][place % count] for place in places]


class Task(Protocol):
    """What is learned."""

    @property
    def count(self) -> int:
        """How many examples there are."""
        ...

    def differentiate(
        self, step: int, examples: Sequence[int]
    ) -> tuple[Mapping[str, float], Sequence[Tensor]]:
        """Return the losses of a step, ``loss`` among them, and the gradient of each parameter ``[...]``."""
        ...

    def validate(self) -> Mapping[str, float]:
        """Return how well it does on examples that are held out; the larger the ``score`` the better."""
        ...


@dataclass
class State:
    """Where a training is."""

    step: int = 0
    best: float = float("-inf")
    waited: int = 0
    """Validations since the best one."""
    facts: dict[str, float] = field(default_factory=dict[str, float])
    """Of the best validation, and the step it followed."""
    best_tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The network's then."""


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, loop: Loop, task: Task, *, key: str, seed: int,
    where: TrainingFiles, on_progress: OnProgress, workers: Workers = ALONE,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train a network, leave it in its best state, and return the facts of that state.

    The best is by the validations' score, the last of equals. ``key``: what the training depends on, so that none goes
    on from another's checkpoint. ``workers``: the processes that train together. ``settings``: what a tracker is told
    of the training. Raises ConfigError for a loss or gradient that is not finite, with the step, or for a checkpoint of
    another training; the checkpoint stays.
    """
    state = _resume(net, optimizer, where, key) if where.resume else State()
    workers.align_([*net.parameters(), *net.buffers()])
    checkpoint, tick = (where.checkpoint, on_progress) if workers.first else (None, ignore)
    rates = [group["lr"] for group in optimizer.param_groups]
    with _logging(where, state.step, settings or {}, workers) as log:
        while state.step < loop.steps and state.waited < loop.patience:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * loop.factor(state.step)
            losses, norm = _step_(net, optimizer, loop, task, state.step, seed)
            state.step += 1
            log.add({"step": state.step, **losses, "gradient": norm})
            if state.step % loop.every == 0 or state.step == loop.steps:
                _validate(net, task, state, log, workers)
                _save(net, optimizer, state, checkpoint, key)
            tick("training", state.step, loop.steps)
    if state.best_tensors:
        net.load_state_dict(state.best_tensors)
    return {**state.facts, "steps": float(state.step)}


def _step_(
    net: nn.Module, optimizer: torch.optim.Optimizer, loop: Loop, task: Task, step: int, seed: int
) -> tuple[Mapping[str, float], float]:
    losses, gradients = task.differentiate(step, loop.chosen(step, task.count, seed))
    parameters = list(net.parameters())
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    norm = float(nn.utils.clip_grad_norm_(parameters, float("inf") if loop.clip is None else loop.clip))
    wrong = [name for name, value in {**losses, "gradient": norm}.items() if not _finite(value)]
    if wrong:
        raise ConfigError(
            f"step {step + 1} of the training: {wrong[0]} is not finite; lower the learning rate, or load the model in "
            "float32"
        )
    optimizer.step()
    optimizer.zero_grad()
    return losses, norm


def _validate(net: nn.Module, task: Task, state: State, log: _Log, workers: Workers) -> None:
    facts = workers.agreed(task.validate())
    log.add({"step": state.step, "validation": facts})
    if not _finite(facts["score"]):
        raise ConfigError(f"the validation after step {state.step} of the training is not finite")
    state.waited = 0 if facts["score"] > state.best else state.waited + 1
    if facts["score"] >= state.best:
        state.best, state.facts = facts["score"], {**facts, "best_step": float(state.step)}
        state.best_tensors = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def _finite(number: float) -> bool:
    return number - number == 0.0


def _order(turn: int, count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(f"errata-training-{seed}-{turn}").shuffle(order)
    return order


# --- checkpoints ----------------------------------------------------------------------------


def _save(
    net: nn.Module, optimizer: torch.optim.Optimizer, state: State, path: Path | None, key: str
) -> None:
    if path is None:
        return
    tensors = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
    tensors |= {f"best.{name}": tensor for name, tensor in state.best_tensors.items()}
    for number, entry in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in entry.items()}
    header = {
        "kind": KIND, "key": key, "step": state.step, "best": state.best, "waited": state.waited, "facts": state.facts,
    }  # fmt: skip
    # safetensors refuses tensors that share memory
    file_format.write(path, {name: tensor.clone() for name, tensor in tensors.items()}, header)


def _resume(net: nn.Module, optimizer: torch.optim.Optimizer, where: TrainingFiles, key: str) -> State:
    """Read a checkpoint into a network and its optimiser. Raises ConfigError for that of another training."""
    if where.checkpoint is None or not where.checkpoint.exists():
        return State()
    tensors, header = file_format.read(where.checkpoint)
    if header.get("kind") != KIND:
        raise EditError(f"{where.checkpoint} is no checkpoint of a training")
    if header["key"] != key:
        raise ConfigError(
            f"{where.checkpoint} is of a training with other settings, cases, seed or model: give the same ones to "
            "resume, or --force to start anew"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    net.load_state_dict(parts["net"])
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts.get("optimizer", {}).items():
        number, _, rest = name.partition(".")
        entries.setdefault(int(number), {})[rest] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
    device = next(net.parameters()).device
    best = {name: tensor.to(device) for name, tensor in parts.get("best", {}).items()}
    return State(header["step"], header["best"], header["waited"], dict(header["facts"]), best)


@contextmanager
def _logging(
    where: TrainingFiles, step: int, settings: Mapping[str, Any], workers: Workers
) -> Iterator[_Log]:
    """Open the log and the tracker of the first process, and close the tracker with how the training ended."""
    if not workers.first:
        yield _Log(None, None, step)
        return
    tracker = None if where.tracker is None else open_tracker(where.tracker, where.run, settings)
    ended = False
    try:
        yield _Log(where.log, tracker, step)
        ended = True
    finally:
        if tracker is not None:
            tracker.close(ended)


class _Log:
    """JSON lines of a training; those after the step that it goes on from are taken back."""

    def __init__(self, path: Path | None, tracker: Tracker | None, step: int) -> None:
        self.path, self.tracker, self.start = path, tracker, time.monotonic()
        if path is None:
            return
        kept = []
        if step and path.exists():
            lines = files.read_text(path, DataError, what="log").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
        files.write(path, "".join(f"{line}\n" for line in kept))

    def add(self, facts: Mapping[str, Any]) -> None:
        """Write a line, and tell the tracker the same numbers."""
        if self.tracker is not None:
            found = {f"validation/{name}": value for name, value in facts.get("validation", {}).items()}
            found |= {name: value for name, value in facts.items() if name not in ("step", "validation")}
            self.tracker.add(found, int(facts["step"]))
        if self.path is not None:
            line = {**facts, "seconds": round(time.monotonic() - self.start, 3)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps(line)}\n")


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for one that was cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
