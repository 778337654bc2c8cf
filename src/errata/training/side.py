"""Train a side network beside a frozen decoder: adapter blocks on its hidden states, see :mod:`errata.linalg.side`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from errata.host import hooks
from errata.host.host import Host
from errata.linalg.side import LAYER, side_change, side_shapes
from errata.progress import OnCount, ignore
from errata.training.slots import row_inputs
from errata.training.tune import Losses, Outcome, Stop, descend


@dataclass(frozen=True)
class SidePlan:
    """How a side network is trained."""

    heads: int
    dropout: float
    """Of attention's weights and of what is added to a layer's states."""
    steps: int
    """Passes over the rows at most."""
    per_step: int
    learning_rate: float
    warmup: int
    """Steps in which the rate rises from zero, before it falls linearly to zero at the last one."""
    weight_decay: float
    clip: float
    """Largest norm of all gradients together."""
    stop: Stop
    shuffle: int
    """Seed of a new order of the rows in each pass."""


def random_side(
    blocks: int, layers: int, d: int, width: int, inner: int, *, start: float, layer_start: float
) -> dict[str, Tensor]:
    """Return an untrained side network by the names of its tensors ``[blocks, ...]``; it adds nothing yet.

    ``start``: standard deviation of the weights before and behind the layers, ``layer_start``: of the layers' own.
    """
    part: dict[str, Tensor] = {}
    for name, shape in side_shapes(blocks, layers, d, width, inner).items():
        if name in ("attention_norm", "norm"):
            part[name] = torch.ones(shape)
        elif name.endswith("_biases") or name == "fusion":
            part[name] = torch.zeros(shape)
        else:
            part[name] = (layer_start if name in LAYER else start) * torch.randn(shape)
    return part


def train_side(
    host: Host, module: str, states: Sequence[str], losses: Losses, part: Mapping[str, Tensor], plan: SidePlan, *,
    rows: int | None = None, tick: OnCount = ignore,
) -> tuple[dict[str, Tensor], Outcome]:  # fmt: skip
    """Train a side network that adds to a module's output, until the rows' losses are low; return it and the losses.

    ``states``: paths of the modules whose inputs its blocks read. ``part``: its tensors ``[...]`` to begin with.
    ``losses`` whose depth is not above the module's block. ``rows``: run at once. Requires a frozen model.
    """
    layer, device = host.model.get_submodule(module), host.device
    read = {
        path: row_inputs(host, path, [line.ids for line in losses.lines]) for path in dict.fromkeys(states)
    }
    variables = {name: t.to(device, copy=True).requires_grad_() for name, t in part.items()}
    optimizer = _Clipping(
        list(variables.values()), plan.clip, lr=plan.learning_rate, weight_decay=plan.weight_decay
    )
    total = plan.steps * -(-losses.count // plan.per_step)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (plan.warmup + 1), max(0.0, (total - step) / max(1, total)))
    )

    def loss(indices: Sequence[int]) -> Tensor:
        lengths = torch.tensor([len(losses.lines[i].ids) for i in indices])

        def add(output: Tensor) -> Tensor:
            length = output.shape[1]
            wide = output.to(torch.promote_types(output.dtype, torch.float32))
            inputs = {
                path: torch.stack(
                    [functional.pad(rows[i], (0, 0, 0, length - len(rows[i]))) for i in indices]
                )
                for path, rows in read.items()
            }
            tokens = (torch.arange(length) < lengths[:, None]).to(output.device)
            dropout = plan.dropout if torch.is_grad_enabled() else 0.0
            change, _ = side_change(
                variables, [inputs[path].to(wide) for path in states], wide, tokens, heads=plan.heads,
                dropout=dropout,
            )  # fmt: skip
            return (wide + change).to(output.dtype)

        with hooks.on_output(layer, add):
            return losses(indices)

    outcome = descend(
        optimizer, loss, losses.count, steps=plan.steps, stop=plan.stop, per_step=plan.per_step,
        shuffle=plan.shuffle, rows=rows, after_step=lambda _: schedule.step(), tick=tick,
    )  # fmt: skip
    return {name: tensor.detach().float().cpu() for name, tensor in variables.items()}, outcome


class _Clipping(torch.optim.AdamW):
    """AdamW on gradients whose norm is bounded."""

    def __init__(self, parameters: list[Tensor], most: float, **options: Any) -> None:
        super().__init__(parameters, **options)
        self.most = most

    def step(self, closure: Any = None) -> Any:
        """Clip gradients and take a step."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.most)
        return super().step(closure)
