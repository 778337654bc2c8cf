"""Take examples out of a model by one Newton step on the loss of the others, along a line.

With a loss that is a sum over examples and H its second derivative without the examples to delete, C, the minimum moves
by H^-1 sum over C of g_z, g_z the gradient of an example's loss: exactly where the loss is quadratic. H is the diagonal
Fisher information of kept texts, the mean of squared gradients, plus damping. How far to go along that direction is
searched, because the likelihood of what is deleted has no lower bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.tokens import Answer
from errata.locate.gradients import Pairs, collect_rows
from errata.training.tune import Losses, beside
from errata.types import Request

Rows = list[dict[str, Pairs]]
"""Of each example, by module: what a map read, and the gradients of the summed loss at its output."""
FIRST = 1e-3
"""First length that is tried, over the norm of the weights."""
DOUBLINGS, HALVINGS = 12, 6
"""Of a step: until it is long enough, and until its length is known to a part in 64."""


@dataclass(frozen=True)
class Gradients:
    """Gradients of examples at some sites, as factors, and the Fisher information of kept ones."""

    sites: tuple[Site, ...]
    deleted: Rows
    kept: Rows

    def total(self, rows: Rows, weights: Sequence[float] | None = None) -> dict[Site, Tensor]:
        """Return the weighted sum of examples' gradients at each site ``[d_out, d_in]``."""
        shares = weights or [1.0] * len(rows)
        return {
            site: sum(
                (_gradient(row[site.name]) * w for row, w in zip(rows, shares, strict=True)), _zeros(site)
            )
            for site in self.sites
        }

    def fisher(self, damping: float) -> dict[Site, Tensor]:
        """Return the mean of the kept examples' squared gradients ``[d_out, d_in]`` plus damping times its mean."""
        found: dict[Site, Tensor] = {}
        for site in self.sites:
            squares = sum((_gradient(row[site.name]).square() for row in self.kept), _zeros(site)) / len(
                self.kept
            )
            found[site] = squares + damping * squares.mean() + torch.finfo(torch.float32).tiny
        return found


def gradients(
    host: Host, deleted: Sequence[Request], kept: Sequence[Sequence[int]], sites: Sequence[Site], *, rows: int
) -> Gradients:
    """Return gradients of the answers to delete and of kept texts, token ids of at least two tokens each."""
    modules = [site.name for site in sites]
    answers = [host.encode_answer(one.text, one.target) for one in deleted]
    texts = [Answer(tuple(ids), 1) for ids in kept]
    found = [collect_rows(host, part, modules, batch_size=rows) for part in (answers, texts)]
    return Gradients(tuple(sites), found[0], found[1])


def newton(found: Gradients, fisher: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """Return the step that deletes examples, H^-1 sum g, by site ``[d_out, d_in]``."""
    return {site: total / fisher[site] for site, total in found.total(found.deleted).items()}


def unchanging(found: Gradients, fisher: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """Return a step that deletes examples and, to first order, leaves the kept ones' mean loss where it is.

    H^-1 (sum of g over the deleted - sum of l_i g_i over the kept), l_i = a_i A / sum of a_i^2, a_z = s^T g_z, A the
    sum over the deleted, s = H^-1 c and c the gradient of that loss: the smallest weights for which s is orthogonal
    to what is in brackets. Source: PUMA, Wu et al., arXiv 2203.00846.
    """
    count = len(found.kept)
    criterion = {site: total / count / fisher[site] for site, total in found.total(found.kept).items()}
    deleted, kept = ([_along(row, criterion) for row in rows] for rows in (found.deleted, found.kept))
    scale = sum(deleted) / max(sum(a * a for a in kept), torch.finfo(torch.float32).tiny)
    minus = found.total(found.kept, [a * scale for a in kept])
    return {site: (total - minus[site]) / fisher[site] for site, total in found.total(found.deleted).items()}


def _along(row: Mapping[str, Pairs], direction: Mapping[Site, Tensor]) -> float:
    """Return the product of an example's gradient with a direction, by factors."""
    total = 0.0
    for site, step in direction.items():
        pairs = row[site.name]
        total += float(((pairs.gradients.to(step) @ step) * pairs.inputs.to(step)).sum())
    return total


def _size(tensors: Iterable[Tensor]) -> float:
    """Return the norm of all tensors' entries together."""
    return sum(float(one.detach().double().square().sum()) for one in tensors) ** 0.5


def _gradient(pairs: Pairs) -> Tensor:
    return pairs.gradients.float().mT @ pairs.inputs.float()


def _zeros(site: Site) -> Tensor:
    return torch.zeros(site.d_out, site.d_in)


# --- how far --------------------------------------------------------------------------------


def far_enough(value: Callable[[float], float], level: float, first: float) -> float:
    """Return the least length, to a part in 64, at which a value reaches a level; doubled from ``first`` on.

    ``value`` at 0 is below the level. Where no length tried reaches it, that of the largest value is returned.
    """
    low, best, most = 0.0, first, -float("inf")
    length = first
    for _ in range(DOUBLINGS):
        now = value(length)
        if now >= level:
            break
        best, most = (length, now) if now > most else (best, most)
        low, length = length, 2 * length
    else:
        return best
    for _ in range(HALVINGS):
        middle = (low + length) / 2
        low, length = (low, middle) if value(middle) >= level else (middle, length)
    return length


def along(
    host: Host, deleted: Sequence[Request], direction: Mapping[Site, Tensor], level: float | None, *, rows: int,
) -> tuple[dict[str, Tensor], dict[str, float | int]]:  # fmt: skip
    """Return the change of each weight ``[d_out, d_in]`` by its path, along a direction, and what was reached.

    Far enough that the mean over answers of NLL per token is ``level``; None: the direction as it is. No weight is
    written.
    """
    wide = torch.promote_types(host.dtype, torch.float32)
    steps = {site: step.to(host.device_of(site), wide) for site, step in direction.items()}
    with hooks.frozen(host.model), torch.no_grad():
        losses = Losses(host, deleted, depth=min(site.layer for site in steps))
        parts = torch.arange(len(deleted)).split(rows)

        def value(length: float) -> float:
            with beside(host, {site: length * step for site, step in steps.items()}):
                found = torch.cat([losses(part.tolist()) for part in parts]).cpu()
            return float(found.nan_to_num(nan=float("inf")).mean())

        start = value(0.0)
        length = 1.0
        if level is not None and start < level:
            unit, weights = _size(steps.values()), _size(host.weight(site) for site in steps)
            length = far_enough(value, level, FIRST * weights / max(unit, torch.finfo(torch.float32).tiny))
        elif level is not None:
            length = 0.0
        facts: dict[str, float | int] = {"nll_before": start, "nll": value(length), "length": length}
    return {site.parameter: length * step for site, step in steps.items()}, facts
