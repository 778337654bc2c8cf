"""EMMET: MEMIT's batches under ROME's equality constraint, softened.

Paper      Gupta et al., "A Unified Framework for Model Editing", EMNLP Findings 2024, arXiv 2403.14236
Implements delta = R (K^T C^-1 K + damping I)^-1 K^T C^-1, values and layers as in MEMIT; one layer by
           default, as in the paper's main comparison
Departs    Solved in the dual. With the weight w that the authors' code puts on C, the solution is
           MEMIT's with lambda = w * damping, so that the default weight is MEMIT's lambda over the
           damping. The damping enters for more than one request only, as in the authors' code
           (other code adds it always: ``damp_single``); one request is then fitted exactly, as ROME does.
Needs      Second moment of keys at the layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.load import Host
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import MEMIT_SETTINGS
from errata.methods._method import Method, Published, Workspace
from errata.methods._settings import CovarianceConfig
from errata.types import Request


@dataclass(frozen=True)
class Config(CovarianceConfig):
    """Settings of EMMET."""

    damping: float = 0.1
    """gamma, added to the diagonal of K^T C^-1 K for more than one request (paper: 0.1)."""
    damp_single: bool = False
    """Whether the damping is added for one request too (EasyEdit: yes)."""
    cov_weight: float | None = None
    """w on C. None: MEMIT's lambda over the damping (authors' code: 1000 for GPT-2 XL, else 1; EasyEdit:
    10,000 to 100,000)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        return [*super().problems(), *positive(self, "damping")]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that gives every request its value, up to the damping."""
    config = _resolve(host, config)
    gamma = config.damping if len(requests) > 1 or config.damp_single else 0.0
    task = closed_form.start_task("emmet", host, requests, config, work)
    costs = closed_form.covariance_costs(task)
    sweep = closed_form.start_sweep(task, closed_form.make_problems(task), costs)
    values = closed_form.find_target_values(task, sweep.problems)
    edit = closed_form.start_edit(task, values)
    for layer in closed_form.sweep_layers(task, sweep, values, edit):
        edit.add(closed_form.solve_layer(task, layer, costs[layer.site], layer.even_share, gamma=gamma))
    return edit.build()


def _resolve(host: Host, config: Config) -> Config:
    """Fill in what is open: one layer, and MEMIT's lambda over the damping."""
    known = METHOD.published_for(host)
    resolved = closed_form.resolve_covariance_config(
        host, config, known, default_layers=closed_form.one_fifth
    )
    assert resolved.cov_weight is not None
    if config.cov_weight is not None:
        return resolved
    return replace(resolved, cov_weight=resolved.cov_weight / config.damping)


ROME_LAYERS = {"gpt2": 17, "gptj": 5, "gpt_neox": 15, "llama": 5}
PUBLISHED: Published = {
    shape: {**settings, "layers": (ROME_LAYERS[shape.family],)} for shape, settings in MEMIT_SETTINGS.items()
}
"""MEMIT's settings at ROME's layers."""


METHOD = Method(
    name="emmet",
    title="EMMET",
    paper="A Unified Framework for Model Editing, EMNLP Findings 2024, arXiv 2403.14236",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "contexts"),
    published=PUBLISHED,
)
