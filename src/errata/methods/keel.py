"""KEEL: kernel edits at all positions from the subject on, in the metric of keys, by natural-gradient steps.

Paper      This project's own method; no paper. The cost of a change is ROME's (Meng et al., NeurIPS 2022, arXiv
           2202.05262), the positions are those of fine-tuning, the step is Polyak's (1987), with zero as the loss
           to reach
Implements U are the inputs of a down-projection at every position from the subject's last token to the one that
           predicts the last target token. With M = C + rho mean(diag C) I + history E[k k^T of earlier edits],
           U^T M^-1 U = Q L Q^T and A = M^-1 U Q L^(-1/2), the change is Y A^T, and |Y|^2 is what it costs
           under M. Y descends the targets' loss by Y <- Y - (loss / |grad|^2) grad, all layers at once, until the
           loss of every request is low: about five steps, without a learning rate, a bound or a decay. A step that
           raises the loss is taken back and tried at a quarter of its length.
           In words: fine-tuning of the span of the edit's own keys, preconditioned by M^-1 on the input side.
           The subject's last token is the same in all statements about the subject, so a change there alone
           changes them all; later positions hold keys that know the relation as well.
           With ``rehearsal``, steps of the same kind follow in which some earlier requests and some texts are
           looked at beside the new requests; of the texts the model is to say what it says unedited. The change
           is then any matrix, not one of the keys' span
Departs    M is the shrunken second moment, not C: with the plain one a sequence loses its neighbours sooner.
           One Y serves all requests of a fit; a sequence adds the earlier edits' keys to M. Each layer's Y is
           cut to the directions that hold its energy. With settings for own statements, M also holds
           anchors E[k k^T of the model's other statements about the subject] + mates E[k k^T of the same
           statement about other subjects of its type], and own paraphrases are fitted beside the prompt; all come
           from the model's own tables. At 0, the default, this is the form with second moments alone
Needs      Second moment of keys at each layer; gradients; for own statements, tables that the model writes once
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.branch import Delta
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError
from errata.host import hooks
from errata.host.layout import Site
from errata.host.load import Host
from errata.host.memory import in_batches
from errata.linalg.lowrank import LowRank
from errata.linalg.solve import CostMatrix, key_basis, solve_with_history, square_factor
from errata.locate.keys import capture_from
from errata.locate.own import kept_keys, training_rows
from errata.locate.problems import PromptRow, value_problems
from errata.methods._method import (
    Layers,
    Method,
    Workspace,
    check_requests,
    notes,
    provenance,
    resolve_layers,
    wide_layers,
)
from errata.methods._rehearse import Rehearsal, rehearse
from errata.methods._settings import Inputs, OwnStatements, TargetEnd, at_least_zero
from errata.training.polyak import PolyakPath
from errata.training.tune import ROWS, Line, Losses, beside_low_rank
from errata.types import Request


@dataclass(frozen=True)
class Config(Inputs, OwnStatements, Rehearsal, TargetEnd):
    """Settings of KEEL."""

    layers: Layers = None
    """Layers whose down-projections are written. None and wide: from a twelfth to five sixths of the depth."""
    rho: float = 0.1
    """Shrinkage: multiple of the mean diagonal entry of C that is added to its diagonal."""
    history: float = 0.1
    """Weight in M of the mean outer product of each earlier edit's keys; 0 forgets them."""
    steps: int = 40
    """Steps at most; about five are taken."""
    stop_loss: float = 0.04
    """Loss in nats per target token that every request has to be below."""
    step_limit: float | None = None
    """Longest step, in norms of Y over all layers. None: no limit."""
    contexts: int = 0
    """How many sampled prefixes each request is also fitted behind; each counts as much as the bare prompt."""
    context_tokens: int = 10
    """Their length in tokens."""
    energy: float = 0.999
    """Share of each layer's squared norm of Y that is kept when its rank is cut; 1 keeps all of it."""
    tokens: int = 1_000_000
    """Token budget of the second moments."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [
            *positive(self, "rho", "steps", "step_limit", "context_tokens", "energy", "tokens"),
            *at_least_zero(self, "history", "stop_loss"),
            *self.own_problems(),
            *self.rehearsal_problems(),
        ]
        if self.energy > 1:
            complaints.append(f"energy: expected a share of at most 1, found {self.energy}")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that lowers the loss of all requests' targets at the least cost under M."""
    check_requests("keel", requests)
    layers = resolve_layers(host, config.layers, wide_layers)
    config = replace(config, layers=layers)
    sites = [host.layout.site(layer) for layer in layers]
    costs = work.costs(host, sites, config.tokens, ridge=config.rho, source=config.moments)
    groups = [(config.contexts, config.context_tokens)] if config.contexts else []
    contexts = work.contexts(host, groups, "flat", config.prefixes)
    problems = value_problems(host, requests, contexts, merge=False, end=config.end)
    own = work.own_texts(host, requests, config.own_counts)
    rows = [training_rows(host, one.rows, text) for one, text in zip(problems, own, strict=True)]
    flat = [row for group in rows for row in group]
    keys = {
        site: torch.cat(inputs).mT
        for site, inputs in capture_from(
            host, [r.ids for r in flat], [r.position for r in flat], sites
        ).items()
    }
    state = dict(work.after.state) if work.after else {}
    statement_keys = kept_keys(host, own, sites, anchors=config.anchors, mates=config.mates)
    earlier = {site: state[_name(site)] for site in sites if _name(site) in state and config.history > 0}
    bases = {
        site: _basis(keys[site], costs[site], earlier.get(site), config.history, statement_keys.get(site))
        for site in sites
    }
    outer, facts = _descend(host, rows, bases, config, work)
    parts = {site: LowRank(outer[site].cpu(), bases[site].mT).cut(config.energy) for site in sites}
    deltas: dict[str, Delta] = {site.parameter: part for site, part in parts.items()}
    if config.rehearsal:
        changes = {site: part.dense().to(host.device_of(site)) for site, part in parts.items()}
        facts |= rehearse(host, requests, changes, costs, config, work)
        deltas = {site.parameter: change.cpu() for site, change in changes.items()}
    share = 1 / len(flat) ** 0.5  # the mean over the texts of this fit
    state |= {_name(site): _history(state.get(_name(site)), keys[site] * share) for site in sites}
    return WeightEdit(
        deltas,
        frozenset(site.parameter for site in sites if site.transposed),
        provenance("keel", host, requests, config, work, **notes(facts)),
        state=state,
    )


# --- where a change may go ------------------------------------------------------------------


def _name(site: Site) -> str:
    return f"{site.parameter}.history"


def _basis(keys: Tensor, cost: CostMatrix, past: Tensor | None, weight: float, own: Tensor | None) -> Tensor:
    """Return A ``[d_in, r]``, orthonormal under the cost with earlier keys and those of own statements in it."""
    solved = cost.solve(keys)
    parts = [] if past is None or weight == 0 else [past.to(keys.dtype) * weight**0.5]
    parts += [] if own is None else [own]
    if parts:
        more = torch.cat(parts, 1)  # [d_in, p]: M is the shrunken C and P P^T
        more = more if more.shape[1] <= more.shape[0] else square_factor(more).to(keys.dtype)
        solved = solve_with_history(solved, more, cost.solve(more))
    return key_basis(keys, solved).to(keys.dtype)


def _history(past: Tensor | None, keys: Tensor) -> Tensor:
    """Return P ``[d_in, p]`` with P P^T the sum of all edits' mean outer products; never wider than high."""
    history = keys if past is None else torch.cat([past.to(keys.dtype), keys], 1)
    return history if history.shape[1] <= history.shape[0] else square_factor(history).to(keys.dtype)


# --- the descent ----------------------------------------------------------------------------


def _descend(
    host: Host, rows: Sequence[Sequence[PromptRow]], bases: Mapping[Site, Tensor], config: Config,
    work: Workspace,
) -> tuple[dict[Site, Tensor], dict[str, float]]:  # fmt: skip
    """Return Y ``[d_out, r]`` for each site, and the loss, the steps and the cost."""
    lines = [_line(row) for group in rows for row in group]
    owner = torch.tensor([i for i, group in enumerate(rows) for _ in group])
    weight = torch.tensor([row.loss_weight for group in rows for row in group], dtype=torch.float64)
    inner = {site: basis.to(host.device_of(site)) for site, basis in bases.items()}
    outer = {
        site: torch.zeros(site.d_out, a.shape[1], dtype=a.dtype, device=a.device, requires_grad=True)
        for site, a in inner.items()
    }
    variables = list(outer.values())
    step, losses = 0, torch.full((len(rows),), float("inf"), dtype=torch.float64)
    best = losses
    path = PolyakPath(config.step_limit)
    with hooks.frozen(host.model):
        measure = Losses(host, lines, depth=min(site.layer for site in bases))
        factors = {site: (outer[site], inner[site]) for site in bases}
        for step in range(config.steps + 1):
            work.on_progress("keel", step, config.steps)
            by_line, gradients = _gradients(host, measure, factors, weight / len(rows), work.batch_size)
            losses = torch.zeros(len(rows), dtype=torch.float64).index_add(0, owner, by_line * weight)
            low = float(losses.max()) < config.stop_loss
            if low or step == config.steps:
                losses = best if not low and path.back_(variables, float(losses.mean())) else losses
                break
            best = losses if float(losses.mean()) < path.loss else best
            path.step_(variables, gradients, float(losses.mean()))
        if not torch.isfinite(losses).all():
            raise ConfigError(f"the loss is {float(losses.sum())}; load the model in float32")
    work.on_progress("keel", config.steps, config.steps)
    cost = sum(float(y.detach().double().square().sum()) for y in outer.values())
    facts = {"loss": float(losses.mean()), "worst": float(losses.max()), "steps": float(step), "cost": cost}
    return {site: y.detach() for site, y in outer.items()}, facts


def _line(row: PromptRow) -> Line:
    """Return a row for the loss: every target token is predicted by the one before it."""
    count = len(row.targets)
    return Line(row.ids, tuple(range(len(row.ids) - count, len(row.ids))), row.targets)


def _gradients(
    host: Host, measure: Losses, factors: Mapping[Site, tuple[Tensor, Tensor]], weights: Tensor,
    batch_size: int | None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Return the loss of each line ``[n]`` and the gradients of their weighted sum, one a Y."""
    variables = [outer for outer, _ in factors.values()]
    total = [torch.zeros_like(y) for y in variables]

    def run(indices: Sequence[int]) -> list[float]:
        with beside_low_rank(host, factors):
            losses = measure(indices)
        share = weights[torch.tensor(list(indices))].to(losses)
        gradients = torch.autograd.grad((losses * share).sum(), variables)
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient
        return losses.detach().tolist()

    losses = in_batches(range(len(measure.lines)), batch_size or ROWS, run)
    return torch.tensor(losses, dtype=torch.float64), total


METHOD = Method(
    name="keel",
    title="KEEL",
    paper="Kernel edits from the model's own language: this project's own method; cost of a change as in ROME, "
    "NeurIPS 2022, arXiv 2202.05262",
    config=Config,
    fit=fit,
    gives=WeightEdit,
    batch=True,
    sequential=True,
    needs=("second_moment", "gradients"),
)
