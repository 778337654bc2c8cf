"""Train Y of a low-rank change Y A^T beside some sites, by Polyak's steps, until every item's loss is low.

The model runs once per step. The first pass, on the model as it is, also gives the inputs of the sites, from which A
is made: its gradients for the sites' outputs, times the inputs, times A, are those for Y at zero.

A change of high rank costs more beside its site, for many tokens, than the site itself. It is then added to the weight
once per step, and the gradient for Y is the weight's, times A. Many lines are run by length, for less padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.memory import in_batches
from errata.progress import OnCount, ignore
from errata.training.gradients import add_up
from errata.training.polyak import PolyakPath
from errata.training.tune import ROWS, Line, Losses, beside_low_rank, with_weights


@dataclass(frozen=True)
class FirstPass:
    """What the model gives before any change."""

    losses: Tensor
    """Of each line, nats per target token, float64 ``[n]``."""
    inputs: Mapping[Site, list[Tensor]]
    """What each site reads at each line's tokens, of each line ``[tokens, d_in]``, float32 at least."""
    gradients: Mapping[Site, Tensor]
    """Of the weighted sum of losses for each site's weight ``[d_out, d_in]``."""


@dataclass(frozen=True)
class Fitted:
    """The result of a descent."""

    outer: Mapping[Site, Tensor]
    """Y of each site ``[d_out, r]``."""
    losses: Tensor
    """Of each item, float64 ``[items]``."""
    steps: int
    cost: float
    """Squared norm of all Y together."""

    def facts(self) -> dict[str, float]:
        """Return what is recorded in the provenance: mean loss, worst loss, steps, cost."""
        losses = self.losses
        return {
            "loss": float(losses.mean()), "worst": float(losses.max()), "steps": float(self.steps),
            "cost": self.cost,
        }  # fmt: skip


class LowRankDescent:
    """Lines with weights, each of an item, and the steps that lower their loss."""

    def __init__(
        self, host: Host, lines: Sequence[Line], weights: Sequence[float], items: Sequence[int],
        sites: Sequence[Site], *, batch_size: int | None = None,
    ) -> None:  # fmt: skip
        """Run what lies below the lowest site once. ``items``: the item of each line, numbered from 0.

        ``weights`` of an item's lines sum to one. Requires a frozen model (:func:`errata.host.hooks.frozen`).
        """
        self.host, self.sites = host, sites
        self.items = torch.tensor(list(items))
        self.weights = torch.tensor(list(weights), dtype=torch.float64)
        self.count = int(self.items.max()) + 1
        self.measure = Losses(host, lines, depth=min(site.layer for site in sites))
        self.batch_size = batch_size or ROWS
        order, lengths = list(range(len(lines))), [len(line.ids) for line in lines]
        if len(lines) > self.batch_size:
            order.sort(key=lengths.__getitem__)
            self.batch_size = max(1, self.batch_size // 2)
        self.order = order
        """In which lines are run."""
        self.tokens = sum(lengths)
        self.dtype = torch.promote_types(host.dtype, torch.float32)

    def by_item(self, losses: Tensor) -> Tensor:
        """Return the weighted mean of each item's losses ``[items]`` from those of all lines ``[n]``."""
        return torch.zeros(self.count, dtype=torch.float64).index_add(0, self.items, losses * self.weights)

    def first_pass(self) -> FirstPass:
        """Run the model without a change; return losses, inputs and gradients."""
        inputs: dict[Site, dict[int, Tensor]] = {site: {} for site in self.sites}
        total = [
            torch.zeros(s.d_out, s.d_in, dtype=self.dtype, device=self.host.device_of(s)) for s in self.sites
        ]

        def run(indices: Sequence[int]) -> list[float]:
            with _tapped(self.host, self.sites) as taps:
                losses = self.measure(indices)
            zeros = [taps[site].zero for site in self.sites]
            errors = torch.autograd.grad(self._mean(losses, indices), zeros)
            read = [taps[site].input.to(self.dtype) for site in self.sites]
            products = [
                error.flatten(0, -2).mT.to(self.dtype) @ states.flatten(0, -2)
                for error, states in zip(errors, read, strict=True)
            ]
            add_up(total, products)
            for site, states in zip(self.sites, read, strict=True):
                rows = states.reshape(len(indices), -1, site.d_in)
                for row, i in zip(rows, indices, strict=True):
                    inputs[site][i] = row[: len(self.measure.lines[i].ids)]
            return losses.detach().tolist()

        losses = self._in_order(self.order, run)
        gradients = dict(zip(self.sites, total, strict=True))
        by_line = {site: [rows[i] for i in range(len(rows))] for site, rows in inputs.items()}
        return FirstPass(losses, by_line, gradients)

    def _in_order(self, lines: Sequence[int], run: Callable[[Sequence[int]], list[float]]) -> Tensor:
        """Run lines in batches; return what ``run`` gives for them by line, float64 ``[n]``, NaN for others."""
        values = torch.full((len(self.order),), math.nan, dtype=torch.float64)
        values[torch.tensor(list(lines), dtype=torch.int64)] = torch.tensor(
            in_batches(lines, self.batch_size, run), dtype=torch.float64
        )
        return values

    def run(
        self, first: FirstPass, bases: Mapping[Site, Tensor], *, steps: int, stop_loss: float,
        step_limit: float | None = None, tick: OnCount = ignore,
    ) -> Fitted:  # fmt: skip
        """Take steps from Y = 0 until every item's loss is below ``stop_loss``; ``bases`` A ``[d_in, r]``.

        ``steps``: at most. ``step_limit``: longest step, in norms of Y over all sites. A step that raises the mean
        loss is taken back, and the best point is returned. Raises ConfigError where a loss is not finite.
        """
        inner = {site: basis.to(self.host.device_of(site)) for site, basis in bases.items()}
        factors = {
            site: (a.new_zeros(site.d_out, a.shape[1]).requires_grad_(), a) for site, a in inner.items()
        }
        variables = [outer for outer, _ in factors.values()]
        path = PolyakPath(step_limit)
        losses = best = self.by_item(first.losses)
        gradients: list[Tensor] | None = [first.gradients[site] @ a for site, a in inner.items()]
        step = 0
        for step in range(steps + 1):
            tick(step, steps)
            if step:
                # after the last step no gradients are needed
                by_line, gradients = self._gradients(factors, stop_loss if step < steps else math.inf)
                losses = self.by_item(by_line)
            low = float(losses.max()) < stop_loss
            if low or step == steps:
                losses = best if not low and path.back_(variables, float(losses.mean())) else losses
                break
            best = losses if float(losses.mean()) < path.loss else best
            assert gradients is not None
            path.step_(variables, gradients, float(losses.mean()))
        if not torch.isfinite(losses).all():
            raise ConfigError(f"the loss is {float(losses.sum())}; load the model in float32")
        tick(steps, steps)
        cost = sum(float(y.detach().double().square().sum()) for y in variables)
        return Fitted({site: y.detach() for site, (y, _) in factors.items()}, losses, step, cost)

    def _gradients(
        self, factors: Mapping[Site, tuple[Tensor, Tensor]], stop_loss: float
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Return each line's loss ``[n]`` and the gradients for each Y; None where all items are below ``stop_loss``.

        Lines that are all below it are differentiated only once others turn out not to be.
        """
        merged = self._merged(factors)
        beside = {site: pair for site, pair in factors.items() if site not in merged}
        leaves = [merged.get(site, outer) for site, (outer, _) in factors.items()]
        weights = {site.parameter: weight for site, weight in merged.items()}
        total = [torch.zeros_like(leaf) for leaf in leaves]
        postponed: list[int] = []

        def measured(indices: Sequence[int]) -> Tensor:
            with beside_low_rank(self.host, beside):
                if not weights:
                    return self.measure(indices)
                return with_weights(self.host, weights, lambda: self.measure(indices))

        def differentiate(indices: Sequence[int], *, postpone: bool) -> list[float]:
            losses = measured(indices)
            if postpone and float(losses.detach().max()) < stop_loss:
                postponed.extend(indices)
            else:
                add_up(total, torch.autograd.grad(self._mean(losses, indices), leaves))
            return losses.detach().tolist()

        losses = self._in_order(self.order, lambda part: differentiate(part, postpone=True))
        if float(self.by_item(losses).max()) < stop_loss:
            return losses, None
        in_batches(postponed, self.batch_size, lambda part: differentiate(part, postpone=False))
        gradients = [
            (total[i].mT if site.transposed else total[i]) @ inner if site in merged else total[i]
            for i, (site, (_, inner)) in enumerate(factors.items())
        ]
        return losses, gradients

    def _merged(self, factors: Mapping[Site, tuple[Tensor, Tensor]]) -> dict[Site, Tensor]:
        """Return the weights, as they are stored, with the changes whose rank makes that cheaper than beside them."""
        merged: dict[Site, Tensor] = {}
        for site, (outer, inner) in factors.items():
            rank, full = inner.shape[1], site.d_in * site.d_out
            # products of one pass and its gradients: for each token beside the site, or in its weight, whose change is
            # multiplied out and whose gradient is projected once
            beside = self.tokens * rank * (2 * site.d_in + 3 * site.d_out)
            if beside <= 2 * rank * full + self.tokens * full or site.packed or self.host.dtype != self.dtype:
                continue
            weight = self.host.model.get_submodule(site.name).weight.detach()
            change = outer.detach() @ inner.mT
            merged[site] = (weight + (change.mT if site.transposed else change)).requires_grad_()
        return merged

    def _mean(self, losses: Tensor, indices: Sequence[int]) -> Tensor:
        """Return some lines' part in the mean loss over items, from their losses ``[n]``."""
        share = self.weights[torch.tensor(list(indices))] / self.count
        return (losses * share.to(losses)).sum()


@dataclass
class _Tap:
    """What a site read, and a tensor of zeros that was added to what it wrote."""

    input: Tensor
    zero: Tensor


@contextmanager
def _tapped(host: Host, sites: Sequence[Site]) -> Iterator[dict[Site, _Tap]]:
    """Read each site's input, and add zeros that require gradients to its output; a run fills what is yielded."""
    taps: dict[Site, _Tap] = {}
    with ExitStack() as stack:
        for site in sites:
            module, read = host.model.get_submodule(site.name), list[Tensor]()
            stack.enter_context(hooks.on_input(module, read.append))
            stack.enter_context(hooks.on_output(module, _zero_adder(site, read, taps)))
        yield taps


def _zero_adder(site: Site, read: list[Tensor], taps: dict[Site, _Tap]) -> Callable[[Tensor], Tensor]:
    def add(output: Tensor) -> Tensor:
        taps[site] = _Tap(read.pop().detach(), torch.zeros_like(output, requires_grad=True))
        return output + taps[site].zero

    return add
