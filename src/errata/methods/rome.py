"""ROME: write one fact into one feed-forward layer as a rank-one update.

Paper      Meng et al., "Locating and Editing Factual Associations in GPT", NeurIPS 2022, arXiv 2202.05262;
           keys as in Gupta et al., "Rebuilding ROME", EMNLP Findings 2024, arXiv 2403.07175 (r-ROME)
Implements Sec. 3.1: key averaged over contexts, value by gradient descent, equality-constrained least
           squares: delta = (v* - W k) (C^-1 k)^T / (k^T C^-1 k)
Departs    One key everywhere by default (``keys: mean``, r-ROME). The published formula uses the
           averaged key on the left and the bare one on the right, which lets the denominator vanish:
           ``keys: mixed``. The weight-decay and divergence terms follow the authors' code, not the
           paper's text (norm over squared norm; divergence read at the subject). Where a model has
           no published settings, rate and clamp are measured in the residual stream: beside it a
           feed-forward's output may be small, and the published unit too short.
Needs      Second moment of keys at the layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from errata.config import positive
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host.load import Host
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import CostMatrix, balanced, leverage
from errata.locate.problems import value_problems
from errata.locate.sweep import LayerSweep
from errata.methods import _closed_form as closed_form
from errata.methods._closed_form import LayerSolution, LayerStep
from errata.methods._method import Method, Published, Shape, Workspace, resolve_layers
from errata.methods._settings import Inputs, Ridge, Stopping, at_least_zero, fill_search_defaults
from errata.methods._stabilise import check_steps
from errata.types import Request


@dataclass(frozen=True)
class Config(Inputs, Ridge, Stopping):
    """Settings of ROME."""

    layers: tuple[int, ...] | None = None
    """The one layer to write. None: published for known models, else at a fifth of the depth."""
    keys: Literal["mean", "mixed", "bare"] = "mean"
    """Key in the three places of the formula: mean over contexts (r-ROME), mixed as published, bare (p-ROME)."""
    steps: int = 20
    """Value search: Adam steps at most (paper's code: 20)."""
    learning_rate: float | None = None
    """Value search: Adam's rate, in the unit of ``scale``. None: published for known models, else 0.5
    (paper's code: 0.5, plain)."""
    clamp: float | None = None
    """Value search: largest shift, in the unit of ``scale``. None: published for known models, else 1.5
    (paper's code: 3 to 4 norms of the site's output)."""
    scale: Literal["stream", "site", "published"] | None = None
    """Value search: unit of rate and clamp: the residual stream above the layer, the vector that is shifted,
    or as published (rate plain, clamp in norms of that vector). None: published for known models, else stream."""
    decay: float = 0.5
    """Value search: weight of the shift's norm (paper's code: 0.5)."""
    kl: float = 0.0625
    """Value search: weight of the divergence at "{subject} is a" (paper's code: 0.0625)."""
    contexts: tuple[int, ...] = (10, 10)
    """How many sampled prefixes of each length (paper's code: 10 and 10)."""
    context_tokens: tuple[int, ...] = (5, 10)
    """Their lengths in tokens (paper's code: 5 and 10)."""
    second_moment: bool = True
    """Whether keys are whitened by the second moment; off, C is the identity."""
    tokens: int = 1_000_000
    """Token budget of the second moment (paper: 100,000 articles)."""
    stabilise: tuple[str, ...] = ()
    """Steps on the delta, in order: rect, sphere, prune, simie, each with :setting after it."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = positive(self, "steps", "learning_rate", "clamp", "tokens", "top_count")
        if self.layers is not None and len(self.layers) != 1:
            complaints.append(f"layers: expected one layer, found {list(self.layers)}")
        if len(self.contexts) != len(self.context_tokens):
            complaints.append("contexts: expected as many counts as context_tokens has lengths")
        return [*complaints, *at_least_zero(self, "stop_loss", "cov_ridge"), *check_steps(self.stabilise)]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the rank-one edit that makes the host complete the request with its target."""
    if len(requests) != 1:
        raise ConfigError(f"rome writes one request a fit, found {len(requests)}; memit takes many")
    config = _resolve(host, config)
    task = closed_form.start_task("rome", host, requests, config, work, place="mlp_out")
    (site,) = task.sites
    groups = tuple(zip(config.contexts, config.context_tokens, strict=True))
    contexts = work.contexts(host, groups, "flat", config.prefixes)
    problems = value_problems(host, requests, contexts)
    values = closed_form.find_target_values(task, problems)
    cost = CostMatrix.identity()
    if config.second_moment:
        cost = work.costs(host, [site], config.tokens, ridge=config.cov_ridge, source=config.moments)[site]
    sweep = LayerSweep(host, problems, site.layer)
    mean_key = sweep.keys(site).mT  # [m, 1]
    if config.keys != "mean":
        sweep = LayerSweep(host, value_problems(host, requests, contexts[:1]), site.layer)
    residual = values[0].target[:, None] - sweep.outputs(site).mT  # [d, 1]
    edit = closed_form.start_edit(task, values, leverage=float(leverage(mean_key, cost)))
    if config.keys == "mixed":
        delta = _mixed(mean_key, sweep.keys(site).mT, residual, cost)
        edit.add(closed_form.stabilise_solution(task, LayerSolution(site, delta, None)))
    else:
        layer = LayerStep(site, 1, sweep.keys(site).mT.contiguous(), residual, ((0,),))
        edit.add(closed_form.solve_layer(task, layer, cost, residual, gamma=0.0))
    return edit.build()


def _resolve(host: Host, config: Config) -> Config:
    """Fill in the layer and the value search's units where the settings leave them open."""
    known = METHOD.published_for(host)
    layers = resolve_layers(host, config.layers or known.get("layers"), closed_form.one_fifth)
    return fill_search_defaults(replace(config, layers=layers), closed_form.search_defaults(known))


def _mixed(mean_key: Tensor, bare_key: Tensor, residual: Tensor, cost: CostMatrix) -> LowRank:
    """Published ROME: averaged key on the left, bare key in residual and denominator."""
    u = cost.solve(mean_key)  # [m, 1]
    scale = float((u.mT @ bare_key.double())[0, 0])
    if scale == 0.0:
        raise ConfigError("keys: mixed has a vanishing denominator for this request; use keys: mean")
    return balanced(residual.double() / scale, u.mT).to(residual.dtype)


def _code(layer: int) -> Mapping[str, Any]:
    """Return the settings of the authors' code at a layer."""
    return {"layers": (layer,), "scale": "published", "learning_rate": 0.5, "clamp": 4.0}


PUBLISHED: Published = {
    Shape("gpt2", 48, 1600): _code(17),  # GPT-2 XL
    Shape("gptj", 28, 4096): _code(5),  # GPT-J 6B
    Shape("gpt_neox", 44, 6144): _code(15),  # GPT-NeoX 20B
    Shape("llama", 32, 4096): _code(5),  # Llama 3 8B, AlphaEdit's code
}

METHOD = Method(
    name="rome",
    title="ROME",
    paper="Locating and Editing Factual Associations in GPT, NeurIPS 2022, arXiv 2202.05262",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=False,
    sequential=True,
    needs=("second_moment", "contexts"),
    published=PUBLISHED,
)
