"""PMET: seek values for attention and feed-forward together, write the feed-forward's only.

Paper      Li et al., "PMET: Precise Model Editing in a Transformer", AAAI 2024, arXiv 2308.08742
Implements Joint search of two shifts at the last layer, on attention's output and on the feed-forward's;
           the residual is what is missing at the feed-forward's output, shared between layers by the
           square root of the layers left; delta = R K^T (lambda C + K K^T)^-1
Departs    Solved in the dual. The loop's end follows the authors' code: after an evaluation in which the
           target was the first choice everywhere the targets' loss counts a tenth, until that is lost
           again, and the search ends there if kl times the divergence is at most 0.01. Rate and clamp
           are in units of the residual stream where nothing is published for a model (the authors'
           GPT-J values: rate 0.2, clamp 0.75, lambda 6,000).
Needs      Second moment of keys at each layer; context prefixes written by the model
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.load import Host
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import MEMIT_SETTINGS
from errata.methods._method import Method, Workspace
from errata.methods._settings import CovarianceConfig, search_config
from errata.types import Request


@dataclass(frozen=True)
class Config(CovarianceConfig):
    """Settings of PMET."""

    steps: int = 30
    """Value search: Adam steps at most (paper's code: 30 for GPT-J)."""
    nll_loss_factor: float = 1.0
    """Value search: weight of the targets' loss; a tenth of it while the target is the first choice (code: 1)."""
    kl: float = 1.0
    """Value search: weight of the divergence at "{subject} is a" (paper's code: 1 for GPT-J, 0.8 for NeoX)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "nll_loss_factor")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that writes the feed-forward's part of values found for both parts."""
    config = closed_form.resolve_covariance_config(host, config, METHOD.published_for(host))
    task = closed_form.start_task("pmet", host, requests, config, work, place="attn_and_mlp")
    costs = closed_form.covariance_costs(task)
    sweep = closed_form.start_sweep(task, closed_form.make_problems(task), costs)
    search = search_config(config, nll_loss_factor=config.nll_loss_factor, relax=True)
    values = closed_form.find_target_values(task, sweep.problems, search=search)
    edit = closed_form.start_edit(task, values)
    for layer in closed_form.sweep_layers(task, sweep, values, edit):
        share = layer.missing / math.sqrt(layer.layers_left)
        edit.add(closed_form.solve_layer(task, layer, costs[layer.site], share))
    return edit.build()


METHOD = Method(
    name="pmet",
    title="PMET",
    paper="PMET: Precise Model Editing in a Transformer, AAAI 2024, arXiv 2308.08742",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "contexts"),
    published=MEMIT_SETTINGS,
)
