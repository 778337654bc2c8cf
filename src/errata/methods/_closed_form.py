"""The steps of closed-form editing, as functions that a method's ``fit`` calls in the order of its paper.

Resolve the settings, build the problems, optimise target values, then layer by layer upwards: compute keys and
residuals, solve, and keep the solution in place while the next layer is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from errata.edits.records import Record, contiguous_copy
from errata.edits.weight import Delta, WeightEdit
from errata.errors import CollidingRequests, ConfigError
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.solve import (
    CostMatrix,
    from_solved,
    independent_columns,
    similar_pairs,
    solve_with_history,
)
from errata.locate.contexts import Context, in_form
from errata.locate.problems import Span, Token, ValueProblem, subject_span, value_problems, with_erased
from errata.locate.sweep import LayerSweep
from errata.locate.values import Value, ValueConfig, Where, find_values
from errata.methods._method import Layers, Published, Shape, Workspace, notes, provenance, resolve_layers
from errata.methods._settings import (
    ClosedFormConfig,
    CovarianceConfig,
    NullSpaceConfig,
    SearchDefaults,
    SearchSettings,
    fill_search_defaults,
    search_config,
)
from errata.methods._stabilise import StepContext, delta_steps, value_steps
from errata.types import Request

SHORT = 0.75
"""Largest shift of methods for long sequences of edits, in norms of the residual stream (MEMIT's code)."""
COLLIDING = 0.98
"""Cosine of two whitened keys from which they count as the same key."""

MEMIT_SETTINGS: Published = {
    # MEMIT's code: GPT-2 XL, GPT-J 6B, GPT-NeoX 20B
    Shape("gpt2", 48, 1600): {
        "layers": (13, 14, 15, 16, 17), "cov_weight": 20_000.0, "scale": "published", "learning_rate": 0.5,
        "clamp": 0.75,
    },
    Shape("gptj", 28, 4096): {
        "layers": (3, 4, 5, 6, 7, 8), "cov_weight": 15_000.0, "scale": "published", "learning_rate": 0.5,
        "clamp": 0.75,
    },
    Shape("gpt_neox", 44, 6144): {
        "layers": (6, 7, 8, 9, 10), "cov_weight": 20_000.0, "scale": "published", "learning_rate": 0.5,
        "clamp": 0.3,
    },
    # AlphaEdit's code: Llama 3 8B
    Shape("llama", 32, 4096): {
        "layers": (4, 5, 6, 7, 8), "cov_weight": 15_000.0, "scale": "published", "learning_rate": 0.1,
        "clamp": 0.75,
    },
}  # fmt: skip
"""MEMIT's layers and settings by shape of model, which related methods reuse."""


# --- settings -------------------------------------------------------------------------------

C = TypeVar("C", bound=ClosedFormConfig)
V = TypeVar("V", bound=CovarianceConfig)


def resolve_config(
    host: Host,
    config: C,
    published: Mapping[str, Any],
    *,
    default_layers: Callable[[int], tuple[int, ...]] | None = None,
    clamp: float = 1.5,
) -> C:
    """Return the settings with unset layers and units of the value search filled in.

    ``published``: settings for a model of this shape. ``default_layers``: from the depth, where nothing is
    published; None: :func:`band`. ``clamp``: the same for the value search. Raises ConfigError for several
    layers where a residual cannot be shared between them.
    """
    defaults = published if host.layout.adds_directly else {}
    layer_rule = (default_layers or band) if host.layout.adds_directly else one_fifth
    layers = resolve_layers(host, config.layers or defaults.get("layers"), layer_rule)
    if not host.layout.adds_directly and len(layers) > 1:
        raise ConfigError(
            "this model normalises what the feed-forward writes, so a residual cannot be shared "
            f"between layers {list(layers)}; name one layer"
        )
    return fill_search_defaults(replace(config, layers=layers), search_defaults(defaults, clamp=clamp))


def resolve_covariance_config(
    host: Host,
    config: V,
    published: Mapping[str, Any],
    *,
    default_layers: Callable[[int], tuple[int, ...]] | None = None,
    clamp: float = 1.5,
) -> V:
    """Return the settings as :func:`resolve_config`, with lambda as published, else a multiple of the key width."""
    config = resolve_config(host, config, published, default_layers=default_layers, clamp=clamp)
    if config.cov_weight is not None:
        return config
    defaults = published if host.layout.adds_directly else {}
    assert isinstance(config.layers, tuple)
    cov_weight = config.cov_relative * host.layout.site(min(config.layers)).d_in
    return replace(config, cov_weight=defaults.get("cov_weight", cov_weight))


def search_defaults(published: Mapping[str, Any], *, clamp: float = 1.5) -> SearchDefaults:
    """Return the learning rate, clamp and unit as published, else in the unit of the residual stream."""
    names = ("learning_rate", "clamp", "scale")
    values = {name: published[name] for name in names if name in published}
    return SearchDefaults(**{"clamp": clamp, **values})


def sequential_clamp(requests: Sequence[Request], work: Workspace) -> float:
    """Return the clamp of methods for long sequences: short unless a single request is edited first."""
    return 1.5 if len(requests) == 1 and work.after is None else SHORT


def band(depth: int) -> tuple[int, ...]:
    """Return the layers from an eighth to three tenths of the depth, similar to the bands in the papers."""
    first, last = depth // 8, max(depth // 8, round(0.3 * depth))
    return tuple(range(first, min(last, depth - 1) + 1))


def one_fifth(depth: int) -> tuple[int, ...]:
    """Return the one layer at a fifth of the depth."""
    return (depth // 5,)


# --- one fit --------------------------------------------------------------------------------


class TaskSettings(SearchSettings, Protocol):
    """Settings that every closed-form fit uses."""

    @property
    def layers(self) -> Layers: ...
    @property
    def stabilise(self) -> tuple[str, ...]: ...


class ErasingSettings(TaskSettings, Protocol):
    """The same, with what happens to old answers."""

    @property
    def erase(self) -> float: ...
    @property
    def erase_above(self) -> float: ...


T = TypeVar("T", bound=TaskSettings, covariant=True)


@dataclass(frozen=True)
class Task(Generic[T]):
    """What all steps of one fit share."""

    method: str
    host: Host
    requests: Sequence[Request]
    config: T
    """Settings, resolved."""
    work: Workspace
    place: Where
    """The activation that the value search shifts at the last layer, and that a sweep compares to its values."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Tensors for later fits; stored in the edit."""

    @property
    def sites(self) -> list[Site]:
        """The sites to edit, from the lowest layer."""
        return [self.host.layout.site(layer) for layer in self.layers]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers to edit; settings are resolved by now."""
        assert isinstance(self.config.layers, tuple)
        return self.config.layers

    def with_initial_state(self) -> Task[T]:
        """Return the task with the state from its beginning."""
        return replace(self, state=_state_of(self.work))

    def earlier_delta(self, site: Site) -> Delta | None:
        """Return the change of a site's weight by the edit that this fit continues."""
        return self.work.after.deltas.get(site.parameter) if self.work.after else None

    def earlier_record(self, site: Site) -> Record | None:
        """Return the record of a site's keys in the edit that this fit continues."""
        return self.work.after.records.get(site.parameter) if self.work.after else None


def start_task(
    method: str, host: Host, requests: Sequence[Request], config: T, work: Workspace,
    *, place: Where = "block_out",
) -> Task[T]:  # fmt: skip
    """Begin a fit with the state of the edit that it continues.

    Where the feed-forward output is not added directly to the residual stream, values are optimised at that output
    instead of the block's.
    """
    if place == "block_out" and not host.layout.adds_directly:
        place = "mlp_out"
    return Task(method, host, requests, config, work, place, _state_of(work))


def _state_of(work: Workspace) -> dict[str, Tensor]:
    return dict(work.after.state) if work.after else {}


def make_contexts(task: Task[ClosedFormConfig]) -> list[Context]:
    """Return the contexts from the settings, the bare prompt first."""
    config = task.config
    groups = [(config.contexts, config.context_tokens)] if config.contexts else []
    return in_form(
        task.host, task.work.contexts(task.host, groups, "half_bare", config.prefixes), config.context_form
    )


def make_problems(
    task: Task[ClosedFormConfig], *, span: Span = subject_span, token: Token = "last"
) -> list[ValueProblem]:
    """Return one problem per request, or with ``merge`` one for all requests with the same key."""
    contexts = make_contexts(task)
    return value_problems(
        task.host,
        task.requests,
        contexts,
        span=span,
        token=token,
        merge=task.config.merge,
        end=task.config.end,
    )


OLD_TOKENS = 8
"""Longest old answer that a model is asked for, in tokens."""


def erasing(
    task: Task[ErasingSettings], problems: Sequence[ValueProblem], contexts: Sequence[Context]
) -> tuple[list[ValueProblem], ValueConfig]:
    """Return problems with rows for old answers, and the search that makes them improbable.

    Without ``erase`` the problems as they are, with the settings' search. ``contexts``: those of the problems.
    """
    config, search = task.config, search_config(task.config)
    if not config.erase:
        return list(problems), search
    old = task.work.old_answers(task.host, task.requests, OLD_TOKENS)
    search = replace(search, erase=config.erase, erase_above=config.erase_above)
    return with_erased(task.host, task.requests, problems, contexts, old), search


# --- what a change costs --------------------------------------------------------------------


def covariance_costs(task: Task[CovarianceConfig]) -> dict[Site, CostMatrix]:
    """Return M = lambda C at each site."""
    config = task.config
    assert config.cov_weight is not None
    costs = task.work.costs(
        task.host, task.sites, config.tokens, ridge=config.cov_ridge, source=config.moments
    )
    return {site: cost.weighted(config.cov_weight) for site, cost in costs.items()}


def null_space_costs(task: Task[NullSpaceConfig]) -> dict[Site, CostMatrix]:
    """Return AlphaEdit's M at each site: changes only in the null space of keys, at a uniform cost there."""
    config = task.config
    if config.projection is not None:
        return projection_costs(task, config.projection)
    costs = {}
    spectra = task.work.spectra(task.host, task.sites, config.tokens, source=config.moments)
    for site, (eigen, name) in spectra.items():
        values = eigen.values.clamp_min(0)
        trace = float(values.sum())
        ascending = values if values.ndim == 1 else values.flatten().sort().values  # of all blocks
        bound = _bound(ascending, config.threshold, config.energy, site)
        cost = config.ridge if config.ridge is not None else config.ridge_relative * trace
        costs[site] = CostMatrix.within(values, eigen.vectors, below=bound, cost=cost, name=name)
    return costs


def projection_costs(task: Task[NullSpaceConfig], path: str) -> dict[Site, CostMatrix]:
    """Return the same for projections read from a file; L2 is 10 where no ridge is set, as in the code."""
    cost = 10.0 if task.config.ridge is None else task.config.ridge
    spectra = {site: task.work.projection(path, site, task.layers) for site in task.sites}
    return {
        site: CostMatrix.within(1 - eigen.values, eigen.vectors, below=0.5, cost=cost, name=name)
        for site, (eigen, name) in spectra.items()
    }


def _bound(values: Tensor, threshold: float | None, energy: float, site: Site) -> float:
    """Return the eigenvalue below which directions may change; ``values`` ascend."""
    if threshold is not None:
        if not bool((values < threshold).any()):
            raise ConfigError(
                f"threshold {threshold} leaves no direction at {site.name}: the smallest eigenvalue is "
                f"{float(values[0]):.3g}; eigenvalues scale with keys, so use energy instead"
            )
        return threshold
    # the smallest eigenvalues whose sum is at most the rest of the trace
    null_count = int((values.cumsum(0) <= (1 - energy) * values.sum()).sum())
    if not 0 < null_count < len(values):
        raise ConfigError(
            f"energy {energy} leaves {null_count} of {len(values)} directions at {site.name}; use another energy, "
            "or more tokens"
        )
    return float(values[null_count])


# --- values ---------------------------------------------------------------------------------


def find_target_values(
    task: Task[TaskSettings], problems: Sequence[ValueProblem], *, search: ValueConfig | None = None
) -> list[Value]:
    """Return one value per problem at the last layer; ``search``: settings other than the task's own."""
    return find_values(
        task.host, problems, layer=task.sites[-1].layer, where=task.place,
        config=search or search_config(task.config), batch_size=task.work.batch_size,
        tick=lambda count, total: task.work.on_progress("values", count, total),
    )  # fmt: skip


def stabilise_values(task: Task[TaskSettings], values: Sequence[Value]) -> Tensor:
    """Return the target values ``[n, d]`` after the stabilisers that act on values."""
    targets = torch.stack([value.target for value in values])
    for step in value_steps(task.config.stabilise):
        targets = step.values(targets, torch.stack([value.start for value in values]), task.state)
    return targets


# --- the sweep over layers ------------------------------------------------------------------


def start_sweep(
    task: Task[TaskSettings], problems: Sequence[ValueProblem], costs: Mapping[Site, CostMatrix],
    *, collisions: bool = True,
) -> LayerSweep:  # fmt: skip
    """Begin at the lowest layer; warn of requests with the same key there but different targets.

    ``collisions``: False where the requests' own targets do not matter, so that none can contradict another.
    """
    first = task.sites[0]
    sweep = LayerSweep(task.host, problems, first.layer)
    if not collisions:
        return sweep
    _warn_of_collisions(task.requests, problems, sweep.keys(first).mT, costs[first])
    return sweep


@dataclass(frozen=True)
class LayerStep:
    """The inputs of one layer's solution."""

    site: Site
    layers_left: int
    """How many layers are still to be edited, this one included."""
    keys: Tensor
    """``[d_in, n]``."""
    missing: Tensor
    """Target values less present values at the last layer, with the lower layers already edited ``[d_out, n]``."""
    requests: tuple[tuple[int, ...], ...]
    """Indices of the requests of each column."""

    @property
    def even_share(self) -> Tensor:
        """``missing`` over the layers left: MEMIT's residual R ``[d_out, n]``."""
        return self.missing / self.layers_left

    def select(self, columns: Tensor) -> LayerStep:
        """Return the step for some columns only; ``columns``: boolean mask ``[n]``."""
        requests = tuple(r for r, keep in zip(self.requests, columns.tolist(), strict=True) if keep)
        return replace(self, keys=self.keys[:, columns], missing=self.missing[:, columns], requests=requests)

    def with_preserved(self, keys: Tensor) -> LayerStep:
        """Return the step with further keys ``[d_in, p]`` before its own, whose outputs are to be preserved."""
        zeros = self.missing.new_zeros(self.missing.shape[0], keys.shape[1])
        requests = (*[self.requests[0]] * keys.shape[1], *self.requests)
        return replace(
            self, keys=torch.cat([keys, self.keys], 1), missing=torch.cat([zeros, self.missing], 1),
            requests=requests,
        )  # fmt: skip


@dataclass(frozen=True)
class CostTerms:
    """Keys k of one layer whose outer products k k^T are added to its M."""

    keys: Tensor
    """``[d_in, p]``, each times the square root of its weight."""
    requests: tuple[tuple[int, ...], ...]
    """Indices of the requests of each column, with which it leaves."""


@dataclass(frozen=True)
class LayerSolution:
    """The change of one site's weight."""

    site: Site
    delta: Delta
    record: Record | None
    """The data it was solved from; None where it cannot be solved again."""


class EditDraft:
    """An edit under construction: the solutions of the layers so far."""

    def __init__(self, task: Task[TaskSettings], facts: Mapping[str, Any]) -> None:
        """Begin without solutions; ``facts`` go into the provenance's notes."""
        self.task = task
        self.provenance = provenance(
            task.method, task.host, task.requests, task.config, task.work, **notes(facts)
        )
        self.solutions: list[LayerSolution] = []

    def add(self, solution: LayerSolution) -> None:
        """Add the solution of the next layer."""
        self.solutions.append(solution)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Place the solutions so far inside a ``with`` block."""
        if not self.solutions:
            yield
            return
        with WeightEdit(self._deltas(), self._transposed(), self.provenance).on(self.task.host):
            yield

    def build(self) -> WeightEdit:
        """Return the edit."""
        records = {s.site.parameter: s.record for s in self.solutions if s.record is not None}
        return WeightEdit(self._deltas(), self._transposed(), self.provenance, records, self.task.state)

    def _deltas(self) -> dict[str, Delta]:
        return {solution.site.parameter: solution.delta for solution in self.solutions}

    def _transposed(self) -> frozenset[str]:
        return frozenset(s.site.parameter for s in self.solutions if s.site.transposed)


def start_edit(task: Task[TaskSettings], values: Sequence[Value], **facts: Any) -> EditDraft:
    """Begin an edit whose provenance records loss, steps and shift of the value search, and ``facts``."""
    search = {
        "loss": max(v.loss for v in values),
        "steps": max(v.steps for v in values),
        "shift": max(float(v.shift.norm() / v.start.norm()) for v in values),
    }
    return EditDraft(task, {**search, **facts})


def sweep_layers(
    task: Task[TaskSettings], sweep: LayerSweep, values: Sequence[Value], draft: EditDraft
) -> Iterator[LayerStep]:
    """Stabilise the values, then yield each layer's keys and residuals, from the lowest layer.

    The caller adds each layer's solution to ``draft``, which is in place while the next layer is computed.
    """
    targets = stabilise_values(task, values)
    sites = task.sites
    top = sites[-1]
    name = top.name if task.place != "block_out" else task.host.layout.blocks[top.layer]
    module = task.host.model.get_submodule(name)
    requests = tuple(problem.requests for problem in sweep.problems)
    for i, site in enumerate(sites):
        with draft.in_place():
            while sweep.layer < site.layer:
                sweep.advance()
            keys = contiguous_copy(sweep.keys(site).mT)
            missing = contiguous_copy((targets - sweep.values(top.layer, module)).mT)
        yield LayerStep(site, len(sites) - i, keys, missing, requests)
        task.work.on_progress("layers", i + 1, len(sites))


def solve_layer(
    task: Task[TaskSettings], layer: LayerStep, cost: CostMatrix, residual: Tensor,
    *, gamma: float = 1.0, history: bool = False, terms: CostTerms | None = None,
) -> LayerSolution:  # fmt: skip
    """Return delta = R (K^T M^-1 K + gamma I)^-1 K^T M^-1 for a layer, stabilised, with its record.

    ``residual`` R ``[d_out, n]``: the change of this layer's output at its keys. ``history``: whether M includes the
    keys of earlier edits, so that their values are preserved, and the terms of earlier edits. ``terms``: of M besides.
    """
    solved = cost.solve(layer.keys)
    earlier = task.earlier_record(layer.site) if history else None
    past = None if earlier is None else (earlier.keys, earlier.solved)
    record = make_record(task, layer, cost, residual, solved, gamma=gamma)
    if terms is not None:
        terms_solved = cost.solve(terms.keys)
        record = record.join(record.as_terms(terms.keys, terms_solved, terms.requests))
        past = _with_terms(past, terms.keys, terms_solved)
    effective = solved if past is None else solve_with_history(solved, *past)
    delta = from_solved(layer.keys, effective, residual, gamma=gamma)
    return stabilise_solution(task, LayerSolution(layer.site, delta, record))


def _with_terms(past: tuple[Tensor, Tensor] | None, keys: Tensor, solved: Tensor) -> tuple[Tensor, Tensor]:
    """Return earlier keys and terms side by side, and M^-1 times them; at most as many as there are directions."""
    if past is not None:
        keys = torch.cat([past[0].double(), keys.double()], 1)
        solved = torch.cat([past[1].double(), solved], 1)
    return independent_columns(keys, solved) if keys.shape[1] > keys.shape[0] else (keys, solved)


def make_record(
    task: Task[TaskSettings], layer: LayerStep, cost: CostMatrix, residual: Tensor, solved: Tensor,
    *, gamma: float = 1.0,
) -> Record:  # fmt: skip
    """Return the record of a layer's solution, with changes relative to the host without edits.

    ``residual`` ``[d_out, n]`` at the layer's n keys; ``solved`` M^-1 times the keys, ``[d_in, n]``.
    """
    keys, before = layer.keys, task.earlier_delta(layer.site)
    absolute = residual if before is None else residual + before.to(keys.dtype) @ keys
    return Record(keys, absolute, solved.to(keys.dtype), gamma, cost.label, layer.requests)


def stabilise_solution(task: Task[TaskSettings], solution: LayerSolution) -> LayerSolution:
    """Return a solution after the stabilisers that act on deltas."""
    steps = delta_steps(task.config.stabilise)
    context = StepContext(task.host, solution.site, task.requests, task.work.after, task.state)
    delta, record = solution.delta, solution.record
    for step in steps:
        delta = step.delta(context, delta)
    if steps and record is not None:
        record = replace(record, is_exact_solution=False)
    return replace(solution, delta=delta, record=record)


def _warn_of_collisions(
    requests: Sequence[Request], problems: Sequence[ValueProblem], keys: Tensor, cost: CostMatrix
) -> None:
    """Warn, before the fit, of pairs of requests that one weight cannot satisfy."""
    collisions = []
    for problem in problems:
        first_by_text: dict[str, int] = {}
        for i in problem.requests:
            first = first_by_text.setdefault(requests[i].text, i)
            if requests[first].target != requests[i].target:
                collisions.append((first, i))
    for a, b in similar_pairs(keys, cost.solve(keys), COLLIDING):
        i, j = problems[a].requests[0], problems[b].requests[0]
        if requests[i].target != requests[j].target:
            collisions.append((i, j))
    for i, j in collisions[:8]:
        warnings.warn(
            f"requests {requests[i].id or i + 1} and {requests[j].id or j + 1} have nearly the same key "
            f"({requests[i].text!r} > {requests[i].target!r}, {requests[j].text!r} > {requests[j].target!r}): "
            "one weight cannot satisfy both; drop one, or use a method without keys",
            CollidingRequests,
            stacklevel=2,
        )
