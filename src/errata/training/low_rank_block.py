"""Train a block of low-rank changes of several linear maps beside a frozen model: y + s B (A x) at each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from errata.host import hooks
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
    factors = {path: _start(host, path, width, plan) for path, width in _widths(host, maps, losses).items()}
    variables = [factor for pair in factors.values() for factor in pair]
    optimizer = torch.optim.AdamW(variables, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, plan.decay_every, plan.decay)

    def loss(indices: Sequence[int]) -> Tensor:
        with _beside(host, factors, plan):
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


@torch.no_grad()
def _widths(host: Host, maps: Sequence[str], losses: Losses) -> dict[str, tuple[int, int]]:
    """Return the widths of what each map reads and gives, as one row shows them."""
    inputs: dict[str, list[Tensor]] = {path: [] for path in maps}
    outputs: dict[str, list[Tensor]] = {path: [] for path in maps}
    with ExitStack() as stack:
        for path in maps:
            module = host.model.get_submodule(path)
            stack.enter_context(hooks.on_input(module, inputs[path].append))
            stack.enter_context(hooks.on_output(module, outputs[path].append))
        losses([0])
    return {path: (inputs[path][0].shape[-1], outputs[path][0].shape[-1]) for path in maps}


def _start(host: Host, path: str, width: tuple[int, int], plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Return B ``[d_out, r]`` of zeros and a random A ``[r, d_in]``, on the map's device."""
    (d_in, d_out), device = width, host.device
    parameter = next(host.model.get_submodule(path).parameters(), None)
    device = device if parameter is None else parameter.device
    bound = 1 / math.sqrt(d_in)
    inner = torch.empty(plan.rank, d_in)
    inner = inner.uniform_(-bound, bound) if plan.start is None else inner.normal_(0.0, plan.start)
    return nn.Parameter(torch.zeros(d_out, plan.rank, device=device)), nn.Parameter(inner.to(device))


@contextmanager
def _beside(host: Host, factors: Mapping[str, tuple[Tensor, Tensor]], plan: BlockPlan) -> Iterator[None]:
    with ExitStack() as stack:
        for path, (outer, inner) in factors.items():
            module, inputs = host.model.get_submodule(path), list[Tensor]()
            stack.enter_context(hooks.on_input(module, inputs.append))
            stack.enter_context(hooks.on_output(module, _adder(inputs, outer, inner, plan)))
        yield


def _adder(inputs: list[Tensor], outer: Tensor, inner: Tensor, plan: BlockPlan) -> Callable[[Tensor], Tensor]:
    def drop(tensor: Tensor) -> Tensor:
        return functional.dropout(tensor, plan.dropout, training=torch.is_grad_enabled())

    def add(output: Tensor) -> Tensor:
        inside = drop(drop(inputs.pop().to(inner.dtype)) @ inner.mT)
        return output + plan.scale * (inside @ outer.mT).to(output.dtype)

    return add
