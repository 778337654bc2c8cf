"""Train a block of low-rank changes of several linear maps beside a frozen model: y + s B (A x) at each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errata.host.beside import low_rank_beside, start_factors
from errata.host.host import Host
from errata.linalg.lowrank import LowRank
from errata.progress import OnCount, ignore
from errata.training.tune import Losses, Outcome, Stop, descend

NEVER = Stop(None)


@dataclass(frozen=True)
class BlockPlan:
    """How a block is trained."""

    rank: int
    """Directions at each map."""
    scale: float
    """s, the factor of B A."""
    steps: int
    """Adam's passes over the rows at most."""
    learning_rate: float
    weight_decay: float = 0.0
    """Decoupled, as AdamW's."""
    decay: float = 1.0
    """Factor on the rate every ``decay_every`` steps."""
    decay_every: int = 1
    start: float | None = None
    """Standard deviation of A's initial entries; None: uniform within 1 / sqrt(d_in), as LoRA's. B starts at zero."""
    dropout: float = 0.0
    """Probability with which an entry of x, and of A x, is left out in training."""
    stop: Stop = NEVER
    per_step: int | None = None
    """Rows per step; None: all."""
    shuffle: int | None = None
    """Seed of a new order of the rows in each pass; None: always the order given."""


def train_block(
    host: Host, maps: Sequence[str], losses: Losses, plan: BlockPlan, *, rows: int | None = None,
    tick: OnCount = ignore,
) -> tuple[dict[str, LowRank], Outcome]:  # fmt: skip
    """Train a block at linear maps, by path, until the rows' losses are low; return s B A of each map, and the losses.

    ``rows``: run at once. Requires a frozen model, and ``losses`` whose depth is not above the lowest map.
    """
    factors = start_factors(host.model, maps, lambda: losses([0]), plan.rank, start=plan.start)
    variables = [factor for pair in factors.values() for factor in pair]
    optimizer = torch.optim.AdamW(variables, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, plan.decay_every, plan.decay)

    def drop(tensor: Tensor) -> Tensor:
        return functional.dropout(tensor, plan.dropout, training=torch.is_grad_enabled())

    def loss(indices: Sequence[int]) -> Tensor:
        with low_rank_beside(host.model, factors, scale=plan.scale, drop=drop):
            return losses(indices)

    outcome = descend(
        optimizer, loss, losses.count, steps=plan.steps, stop=plan.stop, per_step=plan.per_step,
        shuffle=plan.shuffle, rows=rows, after_step=lambda _: schedule.step(), tick=tick,
    )  # fmt: skip
    block = {
        path: LowRank(plan.scale * outer.detach().float().cpu(), inner.detach().float().cpu())
        for path, (outer, inner) in factors.items()
    }
    return block, outcome
