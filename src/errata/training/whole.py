"""Train a model on rows of tokens: all of its weights, or low-rank changes beside them.

Kept are those with the least loss on rows that are held out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errata.host import hooks, passes
from errata.host.beside import Factors, low_rank_beside
from errata.host.host import Host
from errata.progress import OnCount, OnProgress, ignore
from errata.training.tune import Line


@dataclass(frozen=True)
class WholeTraining:
    """Settings of the training."""

    steps: int
    """Steps of AdamW at most."""
    rows: int
    """Rows in a step."""
    learning_rate: float
    """AdamW's."""
    every: int
    """Steps between evaluations on the held-out rows."""
    patience: int
    """Evaluations without a lower loss after which training ends."""


def train_model(
    model: Host, lines: Sequence[Line], held: Sequence[Line], settings: WholeTraining, *, seed: int,
    on_progress: OnProgress, factors: Factors | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train a model in place on -log p of lines' targets; return the steps taken and losses, nats a token.

    With ``held`` lines the weights are in the end those of the least loss on them, else the last. ``factors``: what is
    trained beside the model, whose own weights then stay as they are.
    """
    whole = [p for p in model.model.parameters() if p.is_floating_point()]
    weights = whole if factors is None else [factor for pair in factors.values() for factor in pair]
    with _training(model, weights, factors):
        return train_weights(
            torch.optim.AdamW(weights, lr=settings.learning_rate),
            lambda indices: _loss(model, [lines[i] for i in indices]), len(lines),
            (lambda: held_out_loss(model, held, settings.rows)) if held else None,
            settings, random.Random(f"model {seed}"),
            tick=lambda done, total: on_progress("model", done, total),
        )  # fmt: skip


def train_weights(
    optimizer: torch.optim.Optimizer, loss: Callable[[Sequence[int]], Tensor], count: int,
    held_loss: Callable[[], float] | None, settings: WholeTraining, draw: random.Random, *,
    after_step: Callable[[int], None] = ignore, tick: OnCount = ignore,
) -> dict[str, float]:  # fmt: skip
    """Train an optimiser's parameters in place on rows drawn anew in each step; return the steps taken and losses.

    ``loss`` gives the mean of some of ``count`` rows. With ``held_loss`` the parameters are in the end those of its
    least value, else the last. ``after_step`` gets the number of steps so far.
    """
    weights: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    best, kept, waited, last, step = float("inf"), None, 0, 0.0, 0
    for step in range(1, settings.steps + 1):
        value = loss([draw.randrange(count) for _ in range(settings.rows)])
        gradients = torch.autograd.grad(value, weights, allow_unused=True)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        last = float(value.detach())
        after_step(step)
        tick(step, settings.steps)
        if held_loss is None or (step % settings.every and step < settings.steps):
            continue
        with torch.no_grad():
            now = held_loss()
        waited = 0 if now < best else waited + 1
        if now < best:
            best, kept = now, [weight.detach().clone() for weight in weights]
        if waited >= settings.patience:
            break
    if kept is not None:
        with torch.no_grad():
            for weight, value in zip(weights, kept, strict=True):
                weight.copy_(value)
    return {"steps": step, "loss": last, **({"held_out_loss": best} if kept is not None else {})}


@contextmanager
def _training(model: Host, weights: Sequence[Tensor], factors: Factors | None) -> Iterator[None]:
    """Have weights take gradients, and factors act beside the model alone; neither is so any more on exit."""
    with ExitStack() as stack:
        if factors is None:
            stack.enter_context(hooks.evaluating(model.model))
        else:
            stack.enter_context(hooks.frozen(model.model))
            stack.enter_context(passes.without_interventions())
            stack.enter_context(low_rank_beside(model.model, factors))
        for weight in weights:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in weights:
                weight.grad = None
                weight.requires_grad_(False)


@torch.no_grad()
def held_out_loss(model: Host, lines: Sequence[Line], rows: int) -> float:
    """Return the mean of -log p over the targets of lines, nats a token, run ``rows`` at a time."""
    sums = [(_loss(model, part), sum(len(line.at) for line in part)) for part in _parts(lines, rows)]
    return sum(float(loss) * count for loss, count in sums) / sum(count for _, count in sums)


def _parts(lines: Sequence[Line], rows: int) -> list[Sequence[Line]]:
    return [lines[first : first + rows] for first in range(0, len(lines), rows)]


def _loss(model: Host, lines: Sequence[Line]) -> Tensor:
    row = torch.tensor([i for i, line in enumerate(lines) for _ in line.at])
    at = torch.tensor([place for line in lines for place in line.at])
    targets = torch.tensor([token for line in lines for token in line.targets])
    logits = model.forward_at(model.batch([line.ids for line in lines]), row, at).float()
    return functional.cross_entropy(logits, targets.to(logits.device))
