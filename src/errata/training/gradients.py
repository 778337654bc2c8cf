"""Sum gradients over batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from errata.host.memory import in_batches

R = TypeVar("R")
LossOf = Callable[[Sequence[int]], tuple[Tensor, list[R]]]
"""Runs some items: the loss to differentiate ``[]``, a sum over the items, and what is recorded of each item."""


def sum_gradients(
    indices: Sequence[int], variables: Sequence[Tensor], loss_of: LossOf[R], *, batch: int
) -> tuple[list[R], list[Tensor]]:
    """Return what ``loss_of`` records for each item, and the gradient of the summed loss for each variable.

    Gradients have the shapes of the variables, ``[...]``. ``batch``: items run at once, fewer where memory runs out; a
    batch that does not fit leaves no part of its gradient in the sum.
    """
    total = [torch.zeros_like(variable) for variable in variables]

    def run(part: Sequence[int]) -> list[R]:
        loss, values = loss_of(part)
        add_up(total, torch.autograd.grad(loss, variables))
        return values

    return in_batches(indices, batch, run), total


def add_up(total: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add the gradients of a batch ``[...]`` to those of the batches before, in place."""
    for sum_, gradient in zip(total, gradients, strict=True):
        sum_ += gradient
