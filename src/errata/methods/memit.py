"""MEMIT: write many facts at once, spread over several feed-forward layers by least squares.

Paper      Meng et al., "Mass-Editing Memory in a Transformer", ICLR 2023, arXiv 2210.07229;
           same-subject requests as in MEMIT-Merge, ACL Findings 2025, arXiv 2502.07322
Implements Eq. 14 and Algorithm 1: values z at the top layer's block output; then per layer, upwards,
           delta = R K^T (lambda C + K K^T)^-1 with R the remaining residual over the layers left
Departs    Solved in the dual: rank of each delta <= number of requests, no m x m solve per batch.
           lambda: the papers' numbers (15,000 to 20,000) are one to three times the key width m of
           their models, so elsewhere the default is a multiple of m, chosen on the lab; published
           values are used where known. So it is with rate and clamp.
           Fits that follow one another forget the keys of those before, as published; ``history``
           counts them into the second moment (the sequential variant of the AlphaEdit code).
           Where a norm comes between the feed-forward and the residual stream, a residual cannot be
           spread linearly; such hosts are edited at one layer, with the value at that layer's site.
Needs      Second moment of keys at each layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.edits.weight import WeightEdit
from errata.host.load import Host
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import MEMIT_SETTINGS
from errata.methods._method import Method, Workspace
from errata.methods._settings import CovarianceConfig
from errata.types import Request


@dataclass(frozen=True)
class Config(CovarianceConfig):
    """Settings of MEMIT."""

    history: bool = False
    """Whether fits that go on from an edit protect its keys (paper: not; MEMIT_seq in AlphaEdit's code)."""


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that makes the host complete every request with its target."""
    config = closed_form.resolve_covariance_config(host, config, METHOD.published_for(host))
    task = closed_form.start_task("memit", host, requests, config, work)
    costs = closed_form.covariance_costs(task)
    sweep = closed_form.start_sweep(task, closed_form.make_problems(task), costs)
    values = closed_form.find_target_values(task, sweep.problems)
    edit = closed_form.start_edit(task, values)
    for layer in closed_form.sweep_layers(task, sweep, values, edit):
        cost = costs[layer.site]
        edit.add(closed_form.solve_layer(task, layer, cost, layer.even_share, history=config.history))
    return edit.build()


METHOD = Method(
    name="memit",
    title="MEMIT",
    paper="Mass-Editing Memory in a Transformer, ICLR 2023, arXiv 2210.07229",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "contexts"),
    published=MEMIT_SETTINGS,
)
