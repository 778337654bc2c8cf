"""Losses that make a model forget answers, and the descent on them beside what is to be retained.

Losses are functions of the negative log-likelihood (NLL) of each answer alone, and fall as it rises. NLL is in nats;
``mean`` is over an answer's tokens, ``tokens`` how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.progress import OnCount, ignore
from errata.training.tune import Companions, Line, Losses, Stop, beside, descend
from errata.types import Request

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps mean NLL, tokens and the unedited model's mean NLL, each ``[n]``, to the loss of each answer ``[n]``."""
REACHED = 1e-12
"""Loss below which an answer counts as forgotten; it is zero exactly then."""


def ascent(mean: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
    """Return the loss of gradient ascent ``[n]``: the negative mean NLL, which has no lower bound."""
    del tokens, reference
    return -mean


def npo(beta: float) -> Objective:
    """Return the loss of NPO: -2/beta log sigmoid(beta (NLL - NLL of the unedited model)), sums over tokens.

    Its gradient is that of the NLL times -2 sigmoid(-beta (NLL - reference)): -1 at the unedited model, 0 far from it;
    for beta to 0 it is gradient ascent. Source: Zhang et al., arXiv 2404.05868, Eq. 3.
    """

    def loss(mean: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
        return 2 / beta * functional.softplus(-beta * tokens * (mean - reference))

    return loss


def simnpo(beta: float, margin: float) -> Objective:
    """Return the loss of SimNPO: -2/beta log sigmoid(beta (mean NLL - margin)); no reference model.

    Source: Fan et al., arXiv 2410.07163, Eq. 3; their margin has the opposite sign.
    """

    def loss(mean: Tensor, tokens: Tensor, reference: Tensor) -> Tensor:
        del tokens, reference
        return 2 / beta * functional.softplus(-beta * (mean - margin))

    return loss


def text_line(ids: Sequence[int]) -> Line:
    """Return a text of at least two tokens as a line whose every token but the first is predicted."""
    return Line(tuple(ids[:-1]), tuple(range(len(ids) - 1)), tuple(ids[1:]))


def joined(some: Companions, lines: Sequence[Line], weight: float, requests: int) -> Companions:
    """Return companions with further lines as one more sort, spread evenly over so many requests."""
    if not lines or weight == 0:
        return some
    sort = len(some.weights)
    return Companions(
        (*some.lines, *lines), (*some.owners, *(i % requests for i in range(len(lines)))),
        (*some.sorts, *[sort] * len(lines)), (*some.weights, weight),
    )  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """How to forget."""

    rates: tuple[float, ...]
    """Adam's rate for each site, in plain numbers."""
    steps: int
    """Passes over the requests at most."""
    forgotten: float | None
    """Mean NLL from which on an answer is left alone; None: never."""
    per_step: int | None = None
    """Requests per Adam step; None: all."""


@dataclass(frozen=True)
class Forgotten:
    """The result of forgetting, mean NLL in nats per token."""

    changes: dict[str, Tensor]
    """Change of each weight by its path ``[d_out, d_in]``."""
    before: Tensor
    """Of each answer in the unedited model ``[n]``."""
    after: Tensor
    """Of each answer in the end ``[n]``."""
    retained: tuple[float, float]
    """Of what is retained, mean over all lines, before and in the end; NaN without any."""
    steps: int

    def facts(self) -> dict[str, float | int]:
        """Return what is recorded in the provenance."""
        facts: dict[str, float | int] = {
            "nll_before": float(self.before.mean()), "nll": float(self.after.mean()),
            "least_nll": float(self.after.min()), "steps": self.steps,
        }  # fmt: skip
        if math.isfinite(self.retained[0]):
            facts |= {"retained_nll_before": self.retained[0], "retained_nll": self.retained[1]}
        return facts


def forget(
    host: Host, requests: Sequence[Request], sites: Sequence[Site], objective: Objective, schedule: Schedule, *,
    retain: Companions, rows: int | None = None, tick: OnCount = ignore,
) -> Forgotten:  # fmt: skip
    """Change the sites' weights until the targets of ``requests`` are improbable; what they are is in ``objective``.

    Targets are the answers to forget. An answer whose mean NLL has reached ``schedule.forgotten`` has no loss while it
    stays there; once all have, the descent ends. ``retain``: lines whose loss is added. float32, or float64 for a
    float64 host; no weight is written.
    """
    dtype = torch.promote_types(host.dtype, torch.float32)
    changes = {
        s: torch.zeros(s.d_out, s.d_in, device=host.device_of(s), dtype=dtype, requires_grad=True)
        for s in sites
    }
    groups = [{"params": [changes[s]], "lr": rate} for s, rate in zip(sites, schedule.rates, strict=True)]
    with hooks.frozen(host.model):
        losses = Losses(host, requests, depth=min(site.layer for site in sites), companions=retain)
        count, every = losses.count, range(len(losses.lines))
        tokens = torch.tensor([float(len(line.targets)) for line in losses.lines[:count]])
        with torch.no_grad():
            start = torch.cat([losses(part) for part in _parts(every, rows)]).cpu()
        reference, level = start[:count], schedule.forgotten

        def run(indices: Sequence[int]) -> Tensor:
            with beside(host, changes):
                nll = losses(indices)
            if indices[0] >= count:  # the descent takes requests and companions apart
                return nll
            at = [x[list(indices)].to(nll.device, nll.dtype) for x in (tokens, reference)]
            loss = objective(nll, *at)
            if level is None:
                return loss
            return (loss - objective(torch.full_like(nll, level), *at)).clamp_min(0)

        outcome = descend(
            torch.optim.Adam(groups), run, count, steps=schedule.steps, per_step=schedule.per_step, rows=rows,
            stop=Stop(None if level is None else REACHED), companions=retain, tick=tick,
        )  # fmt: skip
        with torch.no_grad(), beside(host, changes):
            end = torch.cat([losses(part) for part in _parts(every, rows)]).cpu()
    kept = (float(start[count:].mean()), float(end[count:].mean()))
    weights = {site.parameter: change.detach() for site, change in changes.items()}
    return Forgotten(weights, start[:count], end[:count], kept, outcome.steps)


def _parts(indices: range, rows: int | None) -> list[list[int]]:
    size = rows or 32
    return [list(indices[i : i + size]) for i in range(0, len(indices), size)]
