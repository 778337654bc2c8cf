"""Polyak step sizes with zero as the target loss: no learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from errata.errors import ConfigError


class PolyakPath:
    """Steps after which the loss would be zero if it were linear; a step that raises the loss is repeated, shorter."""

    def __init__(self, limit: float | None) -> None:
        """``limit``: longest step; None: any."""
        self.limit = float("inf") if limit is None else limit
        self.radius = self.limit
        self.loss = float("inf")
        self.point: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self.length = 0.0
        """Length of the previous step."""

    @torch.no_grad()
    def step_(self, variables: Sequence[Tensor], gradients: Sequence[Tensor], loss: float) -> None:
        """Step from a point with its gradients and loss, or from the previous one where the loss is not lower.

        ``variables``, in place, and ``gradients``: ``[...]``, one shape a pair.
        """
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
