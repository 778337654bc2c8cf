"""Train a single block: its inputs are fixed, and every token has a target output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from errata.host import hooks
from errata.host.host import Host
from errata.host.memory import in_batches
from errata.host.prefix import ROWS, ComputedRows, split_rows
from errata.locate.values import Value
from errata.training.tune import with_weights


class Block:
    """One block on rows of tokens, with its inputs and the target output of every token."""

    def __init__(
        self, host: Host, layer: int, rows: Sequence[Sequence[int]], places: Sequence[int],
        values: Sequence[Value], *, plain: bool = False,
    ) -> None:  # fmt: skip
        """Record inputs and outputs of the unchanged block; each of the first rows has one token with a new target.

        ``plain``: squared errors, not divided by the old output's mean square.
        """
        self.host, self.rows, self.places = host, rows, places
        self.path = host.layout.blocks[layer]
        self.computed = ComputedRows(host, rows, layer)
        with torch.no_grad():
            self.targets = in_batches(range(len(rows)), ROWS, self.outputs)
        self.unit = 1.0 if plain else float(torch.cat(self.targets).square().mean())
        for row, (place, value) in enumerate(zip(places, values, strict=True)):
            self.targets[row][place] = value.target.to(self.targets[row])
        self.shifts = [float(value.shift.norm()) for value in values]

    def outputs(self, indices: Sequence[int], weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Return the block's output on some rows, each ``[tokens, d]``, with some weights replaced by ``weights``."""
        block, captured = self.host.model.get_submodule(self.path), []

        def run() -> list[Tensor]:
            batch, prefix = self.computed.select(indices)
            with hooks.on_output(block, captured.append):
                self.computed.runner.run(batch, prefix, stop=block)
            wide = captured[0].to(torch.promote_types(captured[0].dtype, torch.float32))
            return split_rows(wide, [len(self.rows[i]) for i in indices], batch)

        return with_weights(self.host, weights or {}, run)

    def errors(self, indices: Sequence[int], weights: Mapping[str, Tensor]) -> Tensor:
        """Return each row's squared error, scaled so that all rows' mean is the objective ``[n]``."""
        edits = len(self.places)
        sizes = [sum(map(len, self.rows[:edits])), sum(map(len, self.rows[edits:]))]
        shares = [len(self.rows) / (sizes[row >= edits] * self.unit) for row in indices]
        outputs = self.outputs(indices, weights)
        errors = [
            (out - self.targets[row]).square().mean(1).sum()
            for out, row in zip(outputs, indices, strict=True)
        ]
        return torch.stack([error * share for error, share in zip(errors, shares, strict=True)])

    def remaining_errors(self, weights: Mapping[str, Tensor]) -> list[float]:
        """Return each request's remaining distance from its target value, as a share of the shift's norm.

        ``weights``: by parameter, tensors of its own shape ``[d_out, d_in]``.
        """

        def share(indices: Sequence[int]) -> list[float]:
            outputs = zip(indices, self.outputs(indices, weights), strict=True)
            gaps = [(row, (out - self.targets[row])[self.places[row]]) for row, out in outputs]
            return [float(gap.norm()) / max(self.shifts[row], 1e-12) for row, gap in gaps]

        with torch.no_grad():
            return in_batches(range(len(self.places)), ROWS, share)
