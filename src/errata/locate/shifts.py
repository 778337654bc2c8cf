"""Shifts of a module's output at one token: the logits there, and how far to go until a token is the first choice.

The logits at that token are a smooth function of the length of a shift. The search evaluates a geometric grid of
lengths, relative to the state that the layer gives, in one pass; then finer grids between the last length that
is too small and the first that is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import log10

import torch
from torch import Tensor

from errata.host import hooks
from errata.host.host import Host
from errata.host.prefix import ComputedRows
from errata.training.tune import Line

GRID, FINER = 48, 3
"""Lengths that are evaluated at once, and how many grids, each inside a step of the one before."""
SMALLEST, LARGEST = 1e-3, 1e3
"""Shifts on the first grid, relative to the norm of the layer's output."""


class OutputShifts:
    """A row whose blocks below a layer are run once, and shifts of a module's output in that layer."""

    def __init__(
        self, host: Host, module: str, layer: int, line: Line, beside: Callable[[], AbstractContextManager[None]]
    ) -> None:  # fmt: skip
        """Take a module of a layer; ``beside``: what else acts while the model runs. Requires a frozen model."""
        self.host, self.module, self.layer, self.line, self.beside = host, module, layer, line, beside
        self.rows = ComputedRows(host, [line.ids], layer, ends=[line.at[0]])

    @torch.no_grad()
    def logits(self, at: int, shifts: Tensor | None = None) -> Tensor:
        """Return the logits at a token under each of some shifts ``[n, d]``, ``[n, vocab]``; None: one of zeros."""
        shifts = torch.zeros(1, self.host.layout.width) if shifts is None else shifts
        batch, prefix = self.rows.select([0] * len(shifts))
        row, column = torch.arange(len(shifts)), batch.offset.cpu() + at

        def add(output: Tensor) -> Tensor:
            place = (row.to(output.device), column.to(output.device))
            return output.index_put(place, shifts.to(output), accumulate=True)

        ends = batch.offset.cpu() + self.line.at[0]
        with self.beside(), hooks.on_output(self.host.model.get_submodule(self.module), add):
            logits = self.rows.runner.run(batch, prefix, at=(row, column), ends=ends).logits
        assert logits is not None
        return logits.float()

    def least(self, at: int, token: int, step: Tensor, *, margin: float) -> float:
        """Return the least multiple of ``step`` ``[d]`` that puts a token ``margin`` nats ahead of all others.

        Where no length on the grid does, the one that puts it furthest ahead.
        """
        size = self._size(at) / max(float(step.norm()), 1e-12)
        grid = torch.logspace(log10(SMALLEST), log10(LARGEST), GRID) * size
        for _ in range(FINER):
            ahead = lead(self.logits(at, grid[:, None] * step), token).cpu()
            enough = (ahead >= margin).nonzero()[:, 0]
            if not len(enough):
                return float(grid[int(ahead.argmax())])
            first = int(enough[0])
            below = float(grid[first - 1]) if first else 0.0
            grid = torch.linspace(below, float(grid[first]), GRID + 1)[1:]
        return float(grid[-1])

    def _size(self, at: int) -> float:
        """Return the norm of the layer's output at a token."""
        states: list[Tensor] = []
        with hooks.on_output(
            self.host.model.get_submodule(self.host.layout.blocks[self.layer]), states.append
        ):
            self.logits(at)
        return float(states[0][0, at].float().norm())


def lead(logits: Tensor, token: int) -> Tensor:
    """Return by how much a token is ahead of all others, in nats ``[n]``, from logits ``[n, vocab]``."""
    others = logits.index_fill(1, torch.tensor([token], device=logits.device), -torch.inf)
    return logits[:, token] - others.amax(1)
