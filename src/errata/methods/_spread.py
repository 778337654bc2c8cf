"""Closed-form editing, once: find values, then layer by layer take keys, measure what is missing, solve.

ROME's relatives differ in what is data here: where values are sought, which M a change costs under, how
a residual is shared between layers, whether earlier edits are protected, what is done to a delta after.
A method file says these things and why; this file does them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.records import Record
from errata.edits.weight import Delta, WeightEdit
from errata.errors import CollidingRequests, ConfigError
from errata.host.layout import Site
from errata.host.load import Host
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import Metric, alike, conditioned, from_solved
from errata.locate.contexts import Context
from errata.locate.problems import Problem, Span, Token, problems, subject_span
from errata.locate.values import Value, ValueConfig, Where, solve
from errata.locate.walk import Walk
from errata.methods._method import (
    Workspace,
    notes,
    open_search,
    provenance,
    resolve_layers,
    resolved,
    search,
)
from errata.methods._settings import Inputs, Ridge, Stopping, check_settings
from errata.methods._stabilise import Around, check, delta_steps, value_steps
from errata.types import Request

SHORT = 0.75
"""Longest shift of methods built for sequences where edits add up, in norms of the stream (MEMIT's code)."""
COLLIDING = 0.98
"""Cosine of two whitened keys from which on they count as one."""


@dataclass(frozen=True)
class SpreadConfig(Inputs, Stopping):
    """Settings that the closed-form methods share; values in brackets are the papers'."""

    layers: tuple[int, ...] | None = None
    """Layers to write, the value search at the last. None: published for known models, else from depth."""
    steps: int = 25
    """Value search: Adam steps at most (MEMIT's code: 20 to 25)."""
    learning_rate: float | None = None
    """Value search: Adam's rate, in the unit of ``scale``. None: published for known models, else 0.5
    (MEMIT's code: 0.5, plain; 0.1 for Llama 3)."""
    clamp: float | None = None
    """Value search: largest shift, in the unit of ``scale``. None: published for known models, else 1.5
    (MEMIT's code: 0.75; other code up to 4)."""
    scale: Literal["stream", "site", "published"] | None = None
    """Value search: unit of rate and clamp: the residual stream above the layer, the vector that is shifted,
    or as published (rate plain, clamp in norms of that vector). None: published for known models, else stream."""
    decay: float = 0.5
    """Value search: weight of the shift's norm (MEMIT's code: 0.5)."""
    kl: float = 0.0625
    """Value search: weight of the divergence at "{subject} is a" (MEMIT's code: 0.0625)."""
    contexts: int = 5
    """How many sampled prefixes; together they count as much as the bare prompt (MEMIT's code: 5)."""
    context_tokens: int = 10
    """Their length in tokens (MEMIT's code: 10)."""
    tokens: int = 1_000_000
    """Token budget of the second moments (MEMIT: 100,000 articles)."""
    merge: bool = True
    """One value for requests that share their text up to the subject (MEMIT-Merge, arXiv 2502.07322)."""
    stabilise: tuple[str, ...] = ()
    """Steps on values or deltas, in order: nas, rect, sphere, prune, simie, each with :setting after it."""

    def problems(self) -> list[str]:
        """Check ranges."""
        numbers = (
            "steps",
            "learning_rate",
            "clamp",
            "tokens",
            "context_tokens",
            "cov_weight",
            "cov_relative",
        )
        present = [name for name in numbers if hasattr(self, name)]
        return [*positive(self, *present), *check_settings(self), *check(self.stabilise)]


@dataclass(frozen=True)
class Covariance(Ridge):
    """Further settings where a change costs under lambda C."""

    cov_weight: float | None = None
    """lambda, how many keys of the corpus weigh against the edits. None: published, else the rule below."""
    cov_relative: float = 0.1
    """lambda in key widths m where cov_weight is None and none is published (papers: 1 to 3 for their models)."""


@dataclass(frozen=True)
class Lasting:
    """What differs for methods built for long sequences: shorter shifts where many edits add up."""

    clamp: float | None = None
    """Value search: largest shift, in the unit of ``scale``. None: published for known models; else 1.5 for one
    request alone, and 0.75 for several requests or on top of an earlier edit, for many edits add up. A
    sequence of single requests begins like one request alone: name the clamp there (authors' code: 0.75)."""


@dataclass(frozen=True)
class Plan:
    """What one method does differently."""

    method: str
    metric: Callable[[Sequence[Site]], Mapping[Site, Metric]]
    """M of the formula at each site, without earlier edits."""
    where: Where = "block_out"
    """What is shifted in the value search, at the last layer."""
    gamma: float = 1.0
    """Ridge in the dual."""
    share: Callable[[int], float] = float
    """What a residual is divided by, from the number of layers left."""
    history: bool = False
    """Whether the keys of the edits before count into M, so that they keep their values."""
    relax: bool = False
    """PMET's way of stopping; see :class:`errata.locate.values.ValueConfig`."""
    span: Span = subject_span
    token: Token = "last"
    chosen: Callable[[Site, Tensor], Tensor] | None = None
    """From keys ``[m, n]``, the coordinates of the site's input that a delta may use."""
    live: Callable[[Tensor, Tensor], Tensor] | None = None
    """Which problems to write, ``[n]`` true or false, from values wanted and values now, ``[n, d]``."""
    contexts: Sequence[Context] | None = None
    """Context prefixes to use instead of the workspace's."""
    sought: Callable[[list[Problem], ValueConfig], list[Value]] | None = None
    """Another way to find values than the common one."""
    laid: Callable[[Sequence[Request]], list[Problem]] | None = None
    """Another way to lay out problems than one a request."""
    total: Callable[[Site, Record], LowRank] | None = None
    """From the records of all fits so far, their change together: for methods that solve anew each time."""
    kept: Callable[[Site], Tensor] | None = None
    """Further keys ``[m, p]`` of the same texts whose values are to stay."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further notes for the record."""


def settle(host: Host, config: Any, requests: Sequence[Request], work: Workspace) -> Any:
    """Fill in layers, the value search's units and lambda where the settings leave them open.

    How far a shift may go depends on whether one request is written alone or many stand together.
    Raises ConfigError for several layers where a residual cannot be shared between them.
    """
    direct = host.layout.adds_directly
    known = host.published if direct else None
    layers = resolve_layers(
        host, config.layers or (known.memit if known else None), band if direct else lambda d: (d // 5,)
    )
    if not direct and len(layers) > 1:
        raise ConfigError(
            "this model normalises what the feed-forward writes, so a residual cannot be shared "
            f"between layers {list(layers)}; name one layer"
        )
    filled = open_search(config, known.memit_search if known else None)
    if isinstance(config, Lasting) and known is None and config.clamp is None:
        alone = len(requests) == 1 and work.after is None
        filled["clamp"] = 1.5 if alone else SHORT
    if isinstance(config, Covariance) and config.cov_weight is None:
        rule = config.cov_relative * host.layout.site(min(layers)).d_in
        filled["cov_weight"] = known.cov_weight if known else rule
    return resolved(config, layers=layers, **filled)


def band(depth: int) -> tuple[int, ...]:
    """Layers from an eighth to three tenths of the depth, as the papers' bands lie."""
    first, last = depth // 8, max(depth // 8, round(0.3 * depth))
    return tuple(range(first, min(last, depth - 1) + 1))


def covariance(
    host: Host, config: Any, work: Workspace, weight: float | None = None
) -> Callable[[Sequence[Site]], Mapping[Site, Metric]]:
    """Return the usual M = lambda C."""
    scale = config.cov_weight if weight is None else weight

    def metric(sites: Sequence[Site]) -> Mapping[Site, Metric]:
        metrics = work.metrics(host, sites, config.tokens, ridge=config.cov_ridge, source=config.moments)
        return {site: metric.weighted(scale) for site, metric in metrics.items()}

    return metric


def null_space(host: Host, config: Any, work: Workspace) -> Callable[[Sequence[Site]], Mapping[Site, Metric]]:
    """Return AlphaEdit's M: no change but where keys of the corpus hardly reach, at a flat cost there.

    ``config`` has ``threshold`` (on eigenvalues) or ``energy`` (share of the trace that stays protected),
    and ``ridge`` or ``ridge_relative`` (in mean squared key norms), or ``projection``, a file of P.
    """
    if config.projection is not None:
        return _projection_metric(config, work)

    def metric(sites: Sequence[Site]) -> Mapping[Site, Metric]:
        made = {}
        spectra = work.spectra(host, sites, config.tokens, source=config.moments)
        for site, (eigen, name) in spectra.items():
            values = eigen.values.clamp_min(0)
            trace = float(values.sum())
            below = _bound(values, config.threshold, config.energy, site)
            cost = config.ridge if config.ridge is not None else config.ridge_relative * trace
            made[site] = Metric.within(values, eigen.vectors, below=below, cost=cost, name=name)
        return made

    return metric


def _projection_metric(config: Any, work: Workspace) -> Callable[[Sequence[Site]], Mapping[Site, Metric]]:
    """Return the same for projections read from a file; L2 is 10 where no ridge is named, as in the code."""

    def metric(sites: Sequence[Site]) -> Mapping[Site, Metric]:
        cost = 10.0 if config.ridge is None else config.ridge
        spectra = {site: work.projection(config.projection, site, config.layers) for site in sites}
        return {
            site: Metric.within(1 - eigen.values, eigen.vectors, below=0.5, cost=cost, name=name)
            for site, (eigen, name) in spectra.items()
        }

    return metric


def _bound(values: Tensor, threshold: float | None, energy: float, site: Site) -> float:
    """Return the eigenvalue under which directions are free to change; ``values`` ascend."""
    if threshold is not None:
        if not bool((values < threshold).any()):
            raise ConfigError(
                f"threshold {threshold} leaves no direction at {site.name}: the smallest eigenvalue is "
                f"{float(values[0]):.3g}; eigenvalues scale with keys, so use energy instead"
            )
        return threshold
    # the smallest eigenvalues that together hold no more than the rest of the trace
    free = int((values.cumsum(0) <= (1 - energy) * values.sum()).sum())
    if not 0 < free < len(values):
        raise ConfigError(
            f"energy {energy} leaves {free} of {len(values)} directions at {site.name}; take another energy, "
            "or more tokens"
        )
    return float(values[free])


def spread(host: Host, requests: Sequence[Request], config: Any, plan: Plan, work: Workspace) -> WeightEdit:
    """Fit requests by a plan; ``config`` is settled. What is in place on the host stays there.

    With ``work.after`` in place, the result is what comes on top of it.
    """
    sites = [host.layout.site(layer) for layer in config.layers]
    where: Where = plan.where if host.layout.adds_directly or plan.where != "block_out" else "mlp_out"
    contexts = plan.contexts or prefixes_of(host, config, work)
    laid = plan.laid(requests) if plan.laid else problems(
        host, requests, contexts, span=plan.span, token=plan.token, merge=config.merge
    )  # fmt: skip
    metrics = plan.metric(sites)
    walk = Walk(host, laid, sites[0].layer)
    _warn_of_collisions(requests, laid, walk.keys(sites[0]).mT, metrics[sites[0]])
    settings = search(config, relax=plan.relax)
    values = plan.sought(laid, settings) if plan.sought else solve(
        host, laid, layer=sites[-1].layer, where=where, config=settings, batch_size=work.batch_size,
        tick=lambda done, total: work.on_progress("values", done, total),
    )  # fmt: skip
    state: dict[str, Tensor] = dict(work.after.state) if work.after else {}
    wanted = torch.stack([v.target for v in values])
    for step in value_steps(config.stabilise):
        wanted = step.values(wanted, torch.stack([v.start for v in values]), state)
    loop = _Loop(host, requests, config, plan, work, where, laid, metrics, state)
    record = provenance(plan.method, host, requests, config, work, **notes(_trace(values, plan)))
    return loop.run(walk, sites, wanted, record)


def prefixes_of(host: Host, config: Any, work: Workspace) -> list[Context]:
    """Return the context prefixes that the settings ask for, the bare prompt first."""
    groups = [(config.contexts, config.context_tokens)] if config.contexts else []
    return work.contexts(host, groups, "half_bare", config.prefixes)


def _trace(values: Sequence[Value], plan: Plan) -> dict[str, Any]:
    return {
        "loss": max(v.loss for v in values),
        "steps": max(v.steps for v in values),
        "shift": max(float(v.shift.norm() / v.start.norm()) for v in values),
        **plan.extra,
    }


@dataclass
class _Loop:
    """The pass over the layers."""

    host: Host
    requests: Sequence[Request]
    config: Any
    plan: Plan
    work: Workspace
    where: Where
    laid: list[Problem]
    metrics: Mapping[Site, Metric]
    state: dict[str, Tensor]
    live: Tensor = field(init=False)
    """Which problems are written."""

    def run(self, walk: Walk, sites: Sequence[Site], wanted: Tensor, provenance: Any) -> WeightEdit:
        """Solve layer by layer, upwards; ``wanted`` ``[n, d]`` at the last site."""
        transposed = frozenset(site.parameter for site in sites if site.transposed)
        top = sites[-1]
        module = self.host.model.get_submodule(
            top.name if self.where != "block_out" else self.host.layout.blocks[top.layer]
        )
        self.live = torch.ones(len(self.laid), dtype=torch.bool)
        deltas: dict[str, Delta] = {}
        totals: dict[str, Delta] = {}
        records: dict[str, Record] = {}
        shaped = bool(delta_steps(self.config.stabilise)) or self.plan.chosen is not None
        for i, site in enumerate(sites):
            with WeightEdit(dict(deltas), transposed, provenance).on(self.host) if deltas else nullcontext():
                while walk.layer < site.layer:
                    walk.advance()
                keys = walk.keys(site).mT  # [m, n]
                now = walk.values(top.layer, module)
                if i == 0 and self.plan.live:
                    self.live = self.plan.live(wanted, now)
                residual = (wanted - now).mT / self.plan.share(len(sites) - i)
                extra = self.plan.kept(site) if self.plan.kept else None
            delta, record = self._solve(site, keys, residual, extra)
            if self.plan.total:
                totals[site.parameter], delta = self._anew(site, record)
            deltas[site.parameter] = self._shaped(site, delta)
            records[site.parameter] = replace(record, solves=not shaped)
            self.work.on_progress("layers", i + 1, len(sites))
        made = totals if self.plan.total else deltas
        return WeightEdit(made, transposed, provenance, records, self.state)

    def _anew(self, site: Site, record: Record) -> tuple[LowRank, LowRank]:
        """Solve for all fits so far; return that change and what it adds to the one in place."""
        assert self.plan.total is not None
        after = self.work.after
        if after is None:
            delta = self.plan.total(site, record)
            return delta, delta
        total = self.plan.total(
            site, after.records[site.parameter].joined(record.shifted(len(self.requests)))
        )
        before = after.deltas[site.parameter]
        thin = before if isinstance(before, LowRank) else LowRank(before, torch.eye(before.shape[1]))
        return total, total + (-1.0) * thin.to(total.B.dtype)

    def _solve(
        self, site: Site, keys: Tensor, residual: Tensor, extra: Tensor | None
    ) -> tuple[LowRank, Record]:
        """Solve one layer; the record tells what is wanted relative to the host without any edit of ours."""
        metric, after = self.metrics[site], self.work.after
        keys, residual = keys[:, self.live], residual[:, self.live]
        of = [p.members for p, live in zip(self.laid, self.live.tolist(), strict=True) if live]
        if extra is not None:  # keys to be kept: nothing is wanted of them
            keys = torch.cat([extra, keys], 1)
            residual = torch.cat([residual.new_zeros(residual.shape[0], extra.shape[1]), residual], 1)
            of = [*[of[0]] * extra.shape[1], *of]
        past = after.records.get(site.parameter) if after and self.plan.history else None
        solved = metric.solve(keys)
        if self.plan.chosen is not None:
            delta = _among(self.plan.chosen(site, keys), metric, keys, residual, past, self.plan.gamma)
        else:
            against = solved if past is None else conditioned(solved, past.keys, past.solved)
            delta = from_solved(keys, against, residual, gamma=self.plan.gamma)
        before = after.deltas.get(site.parameter) if after else None
        absolute = residual if before is None else residual + before.to(keys.dtype) @ keys
        kept = solved.to(keys.dtype)
        return delta, Record(keys, absolute, kept, self.plan.gamma, metric.label, tuple(of))

    def _shaped(self, site: Site, delta: LowRank) -> Delta:
        shaped: Delta = delta
        around = Around(self.host, site, self.requests, self.work.after, self.state)
        for step in delta_steps(self.config.stabilise):
            shaped = step.delta(around, shaped)
        return shaped


def _among(
    columns: Tensor, metric: Metric, keys: Tensor, residual: Tensor, past: Record | None, gamma: float
) -> LowRank:
    """Solve among some coordinates of a site's input only; the delta is zero at the others."""
    cut, among = keys[columns], metric.only(columns)
    solved = among.solve(cut)
    if past is not None:
        solved = conditioned(solved, past.keys[columns], among.solve(past.keys[columns]))
    small = from_solved(cut, solved, residual, gamma=gamma)
    wide = small.A.new_zeros(small.rank, keys.shape[0])
    wide[:, columns] = small.A
    return LowRank(small.B, wide)


def _warn_of_collisions(
    requests: Sequence[Request], laid: Sequence[Problem], keys: Tensor, metric: Metric
) -> None:
    """Warn before anything is fitted when two requests cannot both be had."""
    found = []
    for problem in laid:
        said: dict[str, int] = {}
        for i in problem.members:
            first = said.setdefault(requests[i].text, i)
            if requests[first].target != requests[i].target:
                found.append((first, i))
    pairs = alike(keys, metric.solve(keys), COLLIDING)
    for one, other in pairs:
        i, j = laid[one].members[0], laid[other].members[0]
        if requests[i].target != requests[j].target:
            found.append((i, j))
    for i, j in found[:8]:
        warnings.warn(
            f"requests {requests[i].id or i + 1} and {requests[j].id or j + 1} have nearly the same key "
            f"({requests[i].text!r} > {requests[i].target!r}, {requests[j].text!r} > {requests[j].target!r}): "
            "one weight cannot hold both; drop one, or edit them with a method that needs no key",
            CollidingRequests,
            stacklevel=2,
        )
