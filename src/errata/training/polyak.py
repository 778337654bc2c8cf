"""Polyak's steps with zero as the loss to reach: no learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from errata.errors import ConfigError


class PolyakPath:
    """Steps after which the loss would be zero if it were linear; one that raises it is repeated, shorter."""

    def __init__(self, limit: float | None) -> None:
        """``limit``: longest step; None: any."""
        self.limit = float("inf") if limit is None else limit
        self.radius = self.limit
        self.loss = float("inf")
        self.point: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.length = 0.0
        """Of the step before."""

    @torch.no_grad()
    def step_(self, variables: Sequence[Tensor], gradients: Sequence[Tensor], loss: float) -> None:
        """Go on from a point with its gradients and loss, or from the one before where the loss is not lower.

        ``variables``, in place, and ``gradients``: ``[...]``, one shape a pair. Raises ConfigError where the first
        loss is not finite or its gradients are zero.
        """
        if not self.gradients and not math.isfinite(loss):
            raise ConfigError(f"the loss is {loss} before the first step; load the model in float32")
        if loss < self.loss:
            self.loss, self.radius = loss, min(self.limit, 2 * self.radius)
            self.point = [variable.clone() for variable in variables]
            self.gradients = list(gradients)
        else:
            self.radius = self.length / 4
        size = sum(float(gradient.double().square().sum()) for gradient in self.gradients) ** 0.5
        if size == 0.0:
            raise ConfigError("the loss does not depend on the edited layers; edit lower ones")
        self.length = min(self.loss / size, self.radius)
        for variable, point, gradient in zip(variables, self.point, self.gradients, strict=True):
            variable.copy_(point - self.length / size * gradient)

    @torch.no_grad()
    def back_(self, variables: Sequence[Tensor], loss: float) -> bool:
        """Go back to the point before the last step unless that step lowered the loss; return whether it did not.

        ``variables``, in place: ``[...]`` each.
        """
        if not self.point or loss < self.loss:
            return False
        for variable, point in zip(variables, self.point, strict=True):
            variable.copy_(point)
        return True
