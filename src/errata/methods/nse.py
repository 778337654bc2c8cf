"""NSE: neuron-level sequential editing: values from the unedited model, deltas on few neurons.

Paper      Jiang et al., "Neuron-Level Sequential Editing for Large Language Models", ACL 2025,
           arXiv 2410.04045
Implements Values are sought on the original weights; per layer the input neurons with the largest summed
           activation until a share of it is reached; delta on those columns alone,
           R K_I^T (lambda C_II + K_p K_p^T + K K^T)^-1; passes over the requests that are still
           off their value by more than a bound and less than another, the first pass among them
Departs    The bounds (2.5 to 35 and 50 to 150 by model, plain: ``bounds: plain``) are in norms of the
           residual stream by default, since those norms differ by orders of magnitude. Solved in the
           dual, with C_II factorised anew for the chosen neurons. What later fits protect are the keys
           of all requests on the final weights, as in the authors' code.
Needs      Second moment of keys at each layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.records import Record
from errata.edits.weight import WeightEdit, added
from errata.host.layout import Site
from errata.host.load import Host
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import CostMatrix, conditioned, from_solved
from errata.locate.problems import ValueProblem
from errata.locate.sweep import LayerSweep
from errata.locate.values import Value
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import MEMIT_SETTINGS, LayerSolution, LayerStep, Task
from errata.methods._method import Method, Workspace, without
from errata.methods._settings import CovarianceConfig, SequentialDefaults
from errata.types import Request


@dataclass(frozen=True)
class Config(SequentialDefaults, CovarianceConfig):
    """Settings of NSE."""

    share: float = 0.8
    """Share of the summed activation that the chosen neurons may hold; the one that would cross it is left out
    (code: 0.8 for GPT-J, 1 for GPT-2 XL and Llama 3 8B)."""
    passes: int = 2
    """How often to go over the requests at most (code: 3, of which two take effect)."""
    bounds: Literal["stream", "plain"] = "stream"
    """Unit of ``off`` and ``lost``: norms of the residual stream, or plain numbers (code)."""
    off: float = 0.1
    """A request is written in a pass if its state is further than this from its value, in the unit of ``bounds``
    (code: 35 for GPT-2 XL, 15 for GPT-J, 2.5 for Llama 3 8B, plain)."""
    lost: float = 4.0
    """... and nearer than this; beyond it is given up (code: 150, 100 and 50, plain)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [*super().problems(), *positive(self, "share", "passes", "off", "lost")]
        if self.share > 1:
            complaints.append(f"share: expected at most 1, found {self.share}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit on chosen neurons, in one or more passes."""
    clamp = closed_form.sequential_clamp(requests, work)
    config = closed_form.resolve_covariance_config(host, config, METHOD.published_for(host), clamp=clamp)
    task = closed_form.start_task("nse", host, requests, config, work)
    costs, problems = closed_form.covariance_costs(task), closed_form.make_problems(task)
    sweep = closed_form.start_sweep(task, problems, costs)
    with without(work.after, host):
        values = closed_form.find_target_values(task, problems)
    edit = _one_pass(task, sweep, values, costs)
    for _ in range(config.passes - 1):
        with edit.on(host):
            again = LayerSweep(host, problems, task.sites[0].layer)
            more = _one_pass(task.restarted(), again, values, costs)
        if more.norm() == 0:
            break
        deltas = {name: added(edit.deltas[name], delta) for name, delta in more.deltas.items()}
        edit = replace(edit, deltas=deltas)
    return _with_final_keys(task, edit, costs, problems)


def _one_pass(
    task: Task[Config], sweep: LayerSweep, values: Sequence[Value], costs: Mapping[Site, CostMatrix]
) -> WeightEdit:
    """Return the edit that writes the requests that are off their values now, on neurons chosen for them."""
    edit = closed_form.start_edit(task, values)
    active: Tensor | None = None
    for layer in closed_form.sweep_layers(task, sweep, values, edit):
        if active is None:
            active = _off(layer.missing, values, task.config)
        layer = layer.only(active)
        edit.add(_solve_neurons(task, layer, costs[layer.site]))
    return edit.build()


def _off(missing: Tensor, values: Sequence[Value], config: Config) -> Tensor:
    """Tell which requests are off their values, and not by so much that they are given up ``[n]``."""
    distance = missing.mT.norm(dim=1)
    size = torch.ones_like(distance)
    if config.bounds == "stream":
        size = torch.stack([value.stream for value in values]).norm(dim=1)
    return (distance > config.off * size) & (distance < config.lost * size)


def _solve_neurons(task: Task[Config], layer: LayerStep, cost: CostMatrix) -> LayerSolution:
    """Solve among the main neurons only; the delta is zero at the others."""
    neurons = _main_neurons(layer.keys, task.config.share)
    keys, among = layer.keys[neurons], cost.only(neurons)
    residual = layer.even_share
    solved = among.solve(keys)
    past = task.earlier_record(layer.site)
    if past is not None:
        solved = conditioned(solved, past.keys[neurons], among.solve(past.keys[neurons]))
    narrow = from_solved(keys, solved, residual, gamma=1.0)
    wide = narrow.A.new_zeros(narrow.rank, layer.site.d_in)
    wide[:, neurons] = narrow.A
    record = closed_form.make_record(task, layer, cost, residual, cost.solve(layer.keys))
    record = replace(record, is_exact_solution=False)
    return closed_form.stabilise_solution(task, LayerSolution(layer.site, LowRank(narrow.B, wide), record))


def _with_final_keys(
    task: Task[Config], edit: WeightEdit, costs: Mapping[Site, CostMatrix], problems: Sequence[ValueProblem]
) -> WeightEdit:
    """Return the edit with the keys that later fits protect: those of all requests on the final weights."""
    records: dict[str, Record] = {}
    with edit.on(task.host):
        sweep = LayerSweep(task.host, problems, task.sites[0].layer)
        for site in task.sites:
            while sweep.layer < site.layer:
                sweep.advance()
            keys = sweep.keys(site).mT
            achieved = edit.deltas[site.parameter].to(keys.dtype) @ keys
            records[site.parameter] = replace(
                edit.records[site.parameter], keys=keys, target_changes=achieved,
                solved=costs[site].solve(keys).to(keys.dtype),
                requests=tuple(problem.requests for problem in problems), is_exact_solution=False,
            )  # fmt: skip
    return replace(edit, records=records)


def _main_neurons(keys: Tensor, share: float) -> Tensor:
    """Return the neurons with the largest summed activation that together hold no more than a share, sorted.

    One at least. The sum of all may differ from the last partial sum by rounding: a share of 1 takes all.
    """
    size = keys.double().abs().sum(1)
    order = size.argsort(descending=True)
    held = size[order].cumsum(0)
    count = int((held <= share * held[-1]).sum())
    return order[: max(1, count)].sort().values


METHOD = Method(
    name="nse",
    title="NSE",
    paper="Neuron-Level Sequential Editing for Large Language Models, ACL 2025, arXiv 2410.04045",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "contexts"),
    published=MEMIT_SETTINGS,
)
