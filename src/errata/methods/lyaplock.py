"""LyapLock: refit all edits at every step under a price on preserved knowledge that adapts to its loss.

Paper      Wang et al., "LyapLock: Bounded Knowledge Preservation in Sequential Large Language Model
           Editing", EMNLP 2025, arXiv 2505.15702
Implements Virtual queue Z(t+1) = max(Z + a (PL - D) + b, Z_max) over the preservation loss
           PL = tr((W - W0) C (W - W0)^T); at each step all requests so far are fitted against the
           unedited weights with lambda multiplied by a Z. Settings as in the paper: a = 1/sqrt(D), b = 0,
           Z starts at Z_max = sqrt(D), D = alpha times the first step's loss, so that a Z starts at 1.
           One queue a layer, as in the authors' code
Departs    Written as what it is: one ridge regression of all (key, absolute value) pairs for each step's
           lambda, solved from stored keys in the dual. Lambda multiplies the mean moment of keys, as in
           MEMIT; the paper speaks of the plain sum over 100,000 sampled keys, the authors' code takes
           1,000 times their mean (``cov_weight: 1000``).
Needs      Second moment of keys at each layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host.layout import Site
from errata.host.load import Host
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import CostMatrix
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import MEMIT_SETTINGS, LayerSolution, LayerStep, Task
from errata.methods._method import Method, Workspace
from errata.methods._settings import CovarianceConfig, SequentialDefaults
from errata.types import Request


@dataclass(frozen=True)
class Config(SequentialDefaults, CovarianceConfig):
    """Settings of LyapLock."""

    cov_weight: float | None = None
    """lambda, how many keys of the corpus weigh against the edits. None: MEMIT's where published, else the rule
    below (authors' code: 1,000)."""
    cov_relative: float = 0.3
    """lambda in key widths m where cov_weight is None and none is published (chosen on the lab)."""
    remember: Literal["wanted", "achieved"] = "wanted"
    """What later steps hold earlier requests to: the value that was sought for each, or what the weights gave at its
    key once it was written, W_new K (authors' code: achieved)."""
    alpha: float = 60.0
    """Budget D of the preservation loss, in losses of the first step (paper: 60)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "alpha")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit for these requests and all before them; it replaces the one it continues."""
    clamp = closed_form.sequential_clamp(requests, work)
    config = closed_form.resolve_covariance_config(host, config, METHOD.published_for(host), clamp=clamp)
    if config.stabilise:
        raise ConfigError("lyaplock solves for all edits anew at each step; stabilise does not apply to it")
    task = closed_form.start_task("lyaplock", host, requests, config, work)
    costs = closed_form.covariance_costs(task)
    sweep = closed_form.start_sweep(task, closed_form.make_problems(task), costs)
    values = closed_form.find_target_values(task, sweep.problems)
    edit = closed_form.start_edit(task, values)
    prices = {site: float(task.state.get(f"{site.parameter}.price", torch.ones(1))) for site in task.sites}
    totals: dict[str, LowRank] = {}
    for layer in closed_form.sweep_layers(task, sweep, values, edit):
        total, added = _solve_anew(task, layer, costs[layer.site], prices[layer.site])
        totals[layer.site.parameter] = total
        edit.add(added)
    return _with_prices(task, replace(edit.build(), deltas=totals), costs, prices)


def _solve_anew(
    task: Task[Config], layer: LayerStep, cost: CostMatrix, price: float
) -> tuple[LowRank, LayerSolution]:
    """Solve for the requests of all fits so far; return their change and what it adds to the one in place."""
    record = closed_form.make_record(task, layer, cost, layer.even_share, cost.solve(layer.keys))
    earlier, before = task.earlier_record(layer.site), task.earlier_delta(layer.site)
    every = record if earlier is None else earlier.joined(record.shifted(len(task.requests)))
    # a dearer C is a smaller C^-1 K: nothing is factorised again
    total = replace(every, cost_scale=price).delta()
    if before is None:
        return total, LayerSolution(layer.site, total, record)
    thin = before if isinstance(before, LowRank) else LowRank(before, torch.eye(before.shape[1]))
    return total, LayerSolution(layer.site, total + (-1.0) * thin.to(total.B.dtype), record)


def _with_prices(
    task: Task[Config], edit: WeightEdit, costs: Mapping[Site, CostMatrix], prices: Mapping[Site, float]
) -> WeightEdit:
    """Return the edit with what later steps hold these requests to, and with the prices (a Z) of the next one."""
    records, state = {}, dict(task.state)
    for site, price in prices.items():
        total = edit.deltas[site.parameter]
        assert isinstance(total, LowRank)
        record = replace(edit.records[site.parameter], cost_scale=price)
        if task.config.remember == "achieved":  # no longer what the delta was solved for
            achieved = total.to(record.keys.dtype) @ record.keys
            record = replace(record, target_changes=achieved, is_exact_solution=False)
        records[site.parameter] = record
        loss = costs[site].energy(total)
        budget = state.setdefault(f"{site.parameter}.budget", torch.tensor([task.config.alpha * loss]))
        # with a = 1 / sqrt(D): a Z(t+1) = max(a Z + (PL - D) / D, 1)
        state[f"{site.parameter}.price"] = torch.tensor([max(price + loss / float(budget) - 1, 1.0)])
    return replace(edit, records=records, state=state)


METHOD = Method(
    name="lyaplock",
    title="LyapLock",
    paper="LyapLock: Bounded Knowledge Preservation in Sequential Editing, EMNLP 2025, arXiv 2505.15702",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("second_moment", "contexts"),
    published=MEMIT_SETTINGS,
)
