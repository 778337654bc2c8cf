"""ENCORE: stop each value search early, and penalise the norm of the change.

Paper      Gupta et al., "Lifelong Sequential Knowledge Editing without Model Degradation", ACL Findings
           2025, arXiv 2502.01636
Implements Most-probable early stopping: a search ends once the target is the most probable token in every
           context; delta = R K^T (lambda C + K_p K_p^T + mu I + K K^T)^-1, mu the Frobenius penalty
Departs    Solved in the dual, M from one eigendecomposition for any mu. mu is a share of lambda C's mean
           eigenvalue, a unit that transfers between models, except for GPT-2 XL, Llama 2 7B and Llama 3 8B,
           where it is the code's ``update_norm_lambda``: 10, 10 and 20, plain. There a search also ends as
           in the code: after the target was the most probable with all prefixes in 4, 3 and 2
           evaluations, regardless of the bare prompt. The code compares single tokens, and so never ends
           early for targets of several; here every token of a target must be the most probable.
           Elsewhere a search ends by its loss: a target that is only just the most probable is not
           enough for small models (measured on the lab; the paper's rule is ``stop: top``).
Needs      Second moment of keys at each layer with its eigenvectors; context prefixes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.solve import CostMatrix
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import MEMIT_SETTINGS, Task
from errata.methods._method import Method, Published, Shape, Workspace
from errata.methods._settings import CovarianceConfig, SequentialDefaults
from errata.types import Request


@dataclass(frozen=True)
class Config(SequentialDefaults, CovarianceConfig):
    """Settings of ENCORE."""

    stop: Literal["loss", "top"] | None = None
    """Value search: end at ``stop_loss``, or also once the target was the first choice in every context (paper).
    None: top for models with published settings, else loss."""
    top_count: int | None = None
    """Value search, ``stop: top``: in how many evaluations the target must have been the first choice, in a row or
    not. None: published (code: 4 for GPT-2 XL, 3 for Llama 2 7B, 2 for Llama 3 8B), else 1 (paper)."""
    top_bare: bool | None = None
    """Value search, ``stop: top``: whether the bare prompt is one of the contexts that must agree. None: not for
    models with published settings (code: no), else yes."""
    penalty: float | None = None
    """mu, the penalty on the change's squared norm, in mean eigenvalues of lambda C. None: as published, see
    ``update_norm_lambda``, else 0.02 (chosen on the lab)."""
    update_norm_lambda: float | None = None
    """mu as a plain number, instead of ``penalty``; 0: none, as in MEMIT. None: ``penalty`` where that is set, else
    published (code: 10 for GPT-2 XL and Llama 2 7B, 20 for Llama 3 8B)."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [*super().problems(), *positive(self, "penalty")]
        if self.update_norm_lambda is not None and self.update_norm_lambda < 0:
            complaints.append(f"update_norm_lambda: expected 0 or more, found {self.update_norm_lambda}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit with a penalty on its norm."""
    config = _resolve(host, config, clamp=closed_form.sequential_clamp(requests, work))
    task = closed_form.start_task("encore", host, requests, config, work)
    costs = _penalised_costs(task)
    sweep = closed_form.start_sweep(task, closed_form.make_problems(task), costs)
    values = closed_form.find_target_values(task, sweep.problems)
    edit = closed_form.start_edit(task, values)
    for layer in closed_form.sweep_layers(task, sweep, values, edit):
        edit.add(closed_form.solve_layer(task, layer, costs[layer.site], layer.even_share, history=True))
    return edit.build()


def _penalised_costs(task: Task[Config]) -> dict[Site, CostMatrix]:
    """Return M = lambda C + mu I at each site."""
    config = task.config
    weight, costs = config.cov_weight, {}
    assert weight is not None
    spectra = task.work.spectra(task.host, task.sites, config.tokens, source=config.moments)
    for site, (eigen, name) in spectra.items():
        mu = config.update_norm_lambda
        if mu is None:
            assert config.penalty is not None
            mu = config.penalty * weight * float(eigen.values.clamp_min(0).mean())
        costs[site] = CostMatrix.of_eigen(
            eigen.values, eigen.vectors, weight=weight, add=mu, ridge=config.cov_ridge, name=name
        )
    return costs


def _resolve(host: Host, config: Config, *, clamp: float) -> Config:
    """Return the settings with unset stopping rule and mu filled in, as published where they are."""
    published = dict(METHOD.published_for(host))
    if config.scale not in (None, "published"):  # the code's rate is plain; in other units MEMIT's applies
        memit = MEMIT_SETTINGS.get(Shape(host.family, len(host.layout.blocks), host.layout.width), {})
        published |= {name: memit[name] for name in ("learning_rate",) if name in memit}
    defaults = {name: published.get(name, value) for name, value in SEARCH_ENDS.items()}
    if config.penalty is None and config.update_norm_lambda is None:
        mu = published.get("update_norm_lambda")
        defaults |= {"penalty": 0.02} if mu is None else {"update_norm_lambda": mu}
    missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return closed_form.resolve_covariance_config(host, replace(config, **missing), published, clamp=clamp)


SEARCH_ENDS: Mapping[str, Any] = {"stop": "loss", "top_count": 1, "top_bare": True}
"""Stopping rule where nothing is published."""


def _code_settings(shape: Shape, mu: float, top_count: int) -> Mapping[str, Any]:
    """Return MEMIT's settings for a model with those of ENCORE's code."""
    settings = {
        "update_norm_lambda": mu,
        "learning_rate": 0.5,
        "stop": "top",
        "top_count": top_count,
        "top_bare": False,
    }
    return {**MEMIT_SETTINGS[shape], **settings}


PUBLISHED: Published = {
    **MEMIT_SETTINGS,
    Shape("gpt2", 48, 1600, 6400): _code_settings(Shape("gpt2", 48, 1600), 10.0, 4),
    Shape("llama", 32, 4096, 11008): _code_settings(Shape("llama", 32, 4096), 10.0, 3),  # Llama 2 7B
    Shape("llama", 32, 4096, 14336): _code_settings(Shape("llama", 32, 4096), 20.0, 2),  # Llama 3 8B
}

METHOD = Method(
    name="encore",
    title="ENCORE",
    paper="Lifelong Sequential Knowledge Editing without Model Degradation, ACL Findings 2025, arXiv 2502.01636",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "eigenvectors", "contexts"),
    published=PUBLISHED,
)
