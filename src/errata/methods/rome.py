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
           feed-forward's output may be small, and the published unit too short an arm.
Needs      Second moment of keys at the layer; context prefixes written by the model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from errata.config import positive
from errata.edits.records import Record
from errata.edits.weight import Delta, WeightEdit
from errata.errors import ConfigError
from errata.host.load import Host
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import Metric, balanced, from_solved, leverage
from errata.locate.problems import problems
from errata.locate.values import optimise
from errata.locate.walk import Walk
from errata.methods._method import (
    Method,
    Workspace,
    notes,
    open_search,
    provenance,
    resolve_layers,
    resolved,
    search,
)
from errata.methods._settings import Inputs, Ridge, Stopping, check_settings
from errata.methods._stabilise import Around, check, delta_steps
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
        found = positive(self, "steps", "learning_rate", "clamp", "tokens")
        if self.layers is not None and len(self.layers) != 1:
            found.append(f"layers: expected one layer, found {list(self.layers)}")
        if len(self.contexts) != len(self.context_tokens):
            found.append("contexts: expected as many counts as context_tokens has lengths")
        return [*found, *check_settings(self), *check(self.stabilise)]


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the rank-one edit that makes the host complete the request with its target."""
    if len(requests) != 1:
        raise ConfigError(f"rome writes one request a fit, found {len(requests)}; memit takes many")
    known = (host.published.rome,) if host.published else None
    known_search = host.published.rome_search if host.published else None
    layers = resolve_layers(host, config.layers or known, lambda depth: (depth // 5,))
    config = resolved(config, layers=layers, **open_search(config, known_search))
    site = host.layout.site(layers[0])
    groups = tuple(zip(config.contexts, config.context_tokens, strict=True))
    contexts = work.contexts(host, groups, "flat", config.prefixes)
    value = optimise(
        host, requests, contexts, layer=site.layer, where="mlp_out",
        config=search(config),
    )[0]  # fmt: skip
    metric = Metric.identity()
    if config.second_moment:
        metrics = work.metrics(host, [site], config.tokens, ridge=config.cov_ridge, source=config.moments)
        metric = metrics[site]
    averaged = Walk(host, problems(host, requests, contexts), site.layer)
    chosen = (
        averaged if config.keys == "mean" else Walk(host, problems(host, requests, contexts[:1]), site.layer)
    )
    mean_key = averaged.keys(site).mT  # [m, 1]
    target = value.target[:, None]  # [d, 1]
    records: dict[str, Record] = {}
    if config.keys == "mixed":
        delta = _mixed(mean_key, chosen.keys(site).mT, target - chosen.outputs(site).mT, metric)
    else:
        key, residual = chosen.keys(site).mT.contiguous(), target - chosen.outputs(site).mT
        solved = metric.solve(key)
        delta = from_solved(key, solved, residual, gamma=0.0)
        before = work.after.deltas.get(site.parameter) if work.after else None
        absolute = residual if before is None else residual + before.to(key.dtype) @ key
        records[site.parameter] = Record(key, absolute, solved.to(key.dtype), 0.0, metric.label, ((0,),))
    shaped: Delta = delta
    state = dict(work.after.state) if work.after else {}
    around = Around(host, site, requests, work.after, state)
    for step in delta_steps(config.stabilise):
        shaped = step.delta(around, shaped)
        records = {name: replace(record, solves=False) for name, record in records.items()}
    trace = {
        "loss": value.loss,
        "steps": value.steps,
        "shift": float(value.shift.norm() / value.start.norm()),
        "leverage": float(leverage(mean_key, metric)),
    }
    return WeightEdit(
        {site.parameter: shaped},
        frozenset({site.parameter} if site.transposed else ()),
        provenance("rome", host, requests, config, work, **notes(trace)),
        records,
        state,
    )


def _mixed(mean_key: Tensor, bare_key: Tensor, residual: Tensor, metric: Metric) -> LowRank:
    """Published ROME: averaged key on the left, bare key in residual and denominator."""
    u = metric.solve(mean_key)  # [m, 1]
    scale = float((u.mT @ bare_key.double())[0, 0])
    if scale == 0.0:
        raise ConfigError("keys: mixed has a vanishing denominator for this request; use keys: mean")
    return balanced(residual.double() / scale, u.mT).to(residual.dtype)


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
)
