"""Train independent items at once: each is a row of every parameter, and ends as it would if it were trained alone.

Adam works entry by entry, so only norms, rates and when to stop have to be kept per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from errata.progress import OnCount, ignore
from errata.training.tune import Stop, check_finite


class RowAdam:
    """Adam for independent items at once: each is a row of every parameter and has a rate of its own."""

    def __init__(self, parameters: Sequence[Tensor], rate: float, weight_decay: float = 0.0) -> None:
        """Take leaf tensors ``[n, ...]``; ``weight_decay``: L2 penalty, added to gradients."""
        self.parameters, self.weight_decay, self.steps = parameters, weight_decay, 0
        self.rates = torch.full((len(parameters[0]),), rate, dtype=torch.float64)
        """Rate of each item ``[n]``; an item with rate 0 stays as it is."""
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def step_(self, gradients: Sequence[Tensor]) -> None:
        """Take a step of Adam with its usual constants; gradients ``[n, ...]``, one for each parameter."""
        self.steps += 1
        for parameter, gradient, moments in zip(self.parameters, gradients, self.moments, strict=True):
            gradient = gradient + self.weight_decay * parameter
            first, second = moments
            first.lerp_(gradient, 0.1)
            second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            root = (second / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
            rates = self.rates.to(parameter).reshape(-1, *[1] * (parameter.ndim - 1))
            parameter.sub_(rates * (first / (1 - 0.9**self.steps)) / root)


def descend_each(
    values: nn.Parameter,
    losses: Callable[[Sequence[int]], Tensor],
    *,
    steps: int,
    rate: float,
    stop: Stop,
    tick: OnCount = ignore,
) -> Tensor:
    """Lower the loss of each item by Adam on its own row of ``values`` ``[n, d]``; return the final losses ``[n]``.

    ``losses`` gives the losses of some items ``[n]``, each of which depends on its own row alone. Adam works entry by
    entry, so this is what :func:`descend` does with each item alone: one that stops stays as it is, and is not run any
    more. Raises ConfigError when a loss is not finite.
    """
    optimizer = RowAdam([values], rate)
    final = torch.full((len(values),), float("nan"), dtype=torch.float64)
    running = torch.arange(len(values))
    for step in range(steps):
        tick(step, steps)
        now = losses(running.tolist())
        final[running] = check_finite(now.detach().double().cpu(), step)
        going_on = torch.tensor([not stop.reached(loss) for loss in final[running]])
        if not going_on.any():
            return final
        running = running[going_on]
        optimizer.rates[~torch.zeros(len(values), dtype=torch.bool).index_fill(0, running, True)] = 0
        optimizer.step_(torch.autograd.grad(now[going_on.to(now.device)].sum(), [values]))
    with torch.no_grad():
        final[running] = losses(running.tolist()).double().cpu()
    tick(steps, steps)
    return final


class RowPlateau:
    """Halve an item's rate at the second check in a row in which its loss is not below 95 % of its least so far."""

    def __init__(self, count: int) -> None:
        self.least, self.checks = torch.full((count,), float("inf")), torch.zeros(count, dtype=torch.long)

    def factors(self, items: Tensor, losses: Tensor) -> Tensor:
        """Return what to multiply the rates of some items by ``[n]``, from their losses ``[n]``."""
        better = losses < 0.95 * self.least[items]
        self.least[items] = torch.where(better, losses, self.least[items])
        checks = torch.where(better, 0, self.checks[items] + 1)
        self.checks[items] = torch.where(checks > 1, 0, checks)
        return torch.where(checks > 1, 0.5, 1.0)


@torch.no_grad()
def clip_rows(gradients: Sequence[Tensor], most: float) -> list[Tensor]:
    """Return gradients ``[n, ...]`` whose norm over all parameters is at most ``most`` for each item."""
    norms = torch.stack([g.square().flatten(1).sum(1) for g in gradients]).sum(0).sqrt()
    scales = (most / (norms + 1e-6)).clamp_max(1.0)
    return [g * scales.reshape(-1, *[1] * (g.ndim - 1)) for g in gradients]
