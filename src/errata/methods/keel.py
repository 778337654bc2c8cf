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
           statement about other subjects of its type], and own paraphrases, consequences and inverse statements
           are fitted beside the prompt; all come from the model's own tables, or from text that it writes about
           the subject. At 0, the default, this is the form with second moments alone
Needs      Second moment of keys at each layer; gradients; for own statements, tables that the model writes once
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.deltas import Delta
from errata.edits.records import Record
from errata.edits.weight import WeightEdit
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.lowrank import LowRank
from errata.linalg.shape import condense
from errata.linalg.solve import CostMatrix, key_basis, solve_with_history
from errata.locate.own import OwnText, kept_keys, line_of, training_rows
from errata.locate.problems import PromptRow, value_problems
from errata.methods._consolidate import consolidate, is_due, record_changes
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
from errata.methods._settings import Inputs, JointRequests, OwnStatements, TargetEnd, at_least_zero
from errata.methods._statements import cost_terms, own_statements
from errata.training.low_rank import LowRankDescent
from errata.types import Request


@dataclass(frozen=True)
class Config(Inputs, OwnStatements, Rehearsal, TargetEnd, JointRequests):
    """Settings of KEEL."""

    layers: Layers = None
    """Layers whose down-projections are written. None and wide: from a twelfth to five sixths of the depth."""
    rho: float = 0.1
    """Shrinkage: multiple of the mean diagonal entry of C that is added to its diagonal."""
    history: float = 0.1
    """Weight in M of each earlier fit's keys, the mean over its texts of the sum of k k^T; 0 forgets them."""
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
    consolidate: int = 0
    """After how many requests of a sequence the whole change is solved anew from all records; 0: never."""
    records: bool = True
    """Whether the edit keeps each request's keys and the outputs at them, for retract and refit; they triple it."""
    gamma: float = 0.01
    """Ridge of a refit: how much the cost under M counts beside the squared error of the outputs recorded."""
    tokens: int = 1_000_000
    """Token budget of the second moments."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [
            *positive(
                self, "rho", "steps", "step_limit", "context_tokens", "energy", "tokens", "gamma", "joint"
            ),
            *at_least_zero(self, "history", "stop_loss", "consolidate"),
            *self.own_problems(),
            *self.rehearsal_problems(),
        ]
        if self.consolidate and not self.records:
            complaints.append("consolidate: needs records=true")
        if self.consolidate and self.rehearsal:
            complaints.append("consolidate: it would undo what rehearsal preserves; set one of the two to 0")
        if self.rehearsal and (self.consequences or self.inverses):
            complaints.append("rehearsal: its texts contradict consequences and inverses; set those to 0")
        if self.energy > 1:
            complaints.append(f"energy: expected a share of at most 1, found {self.energy}")
        return complaints


_Row = tuple[PromptRow, int]
"""A text and the index of its request."""


@dataclass(frozen=True)
class _Task:
    """What all steps of one fit share."""

    host: Host
    requests: Sequence[Request]
    config: Config
    work: Workspace
    sites: Sequence[Site]

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Of the edit that the fit continues."""
        return self.work.after.state if self.work.after else {}


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that lowers the loss of all requests' targets at the least cost under M."""
    check_requests("keel", requests)
    layers = resolve_layers(host, config.layers, wide_layers)
    config = replace(config, layers=layers)
    task = _Task(host, requests, config, work, [host.layout.site(layer) for layer in layers])
    costs = work.costs(host, task.sites, config.tokens, ridge=config.rho, source=config.moments)
    own = own_statements(host, requests, config, work)
    rows = _rows(task, own)
    kept, kept_owners = kept_keys(host, own, task.sites, anchors=config.anchors, mates=config.mates)
    keys, thin, facts = _find_changes(task, rows, costs, kept)
    changes: dict[Site, Delta] = dict(thin)
    if config.rehearsal:
        dense = {s: change.dense().to(host.device_of(s)) for s, change in thin.items()}
        facts |= rehearse(host, requests, dense, costs, config, work)
        changes = {site: change.cpu() for site, change in dense.items()}
    records: dict[str, Record] = {}
    if config.records:
        owners = [i for row, i in rows for _ in row.ids[row.position :]]
        terms = {site: cost_terms(columns.cpu(), kept_owners) for site, columns in kept.items()}
        exact = not config.rehearsal
        records = record_changes(
            changes, keys, costs, owners, work.after, gamma=config.gamma, exact=exact, terms=terms
        )
    if is_due(len(requests), work.after, config.consolidate):
        changes = consolidate(records, costs, work.after)
    share = 1 / len(rows) ** 0.5  # the mean over the texts of this fit
    past = {_name(s): _history(task.state.get(_name(s)), keys[s] * share) for s in task.sites}
    return WeightEdit(
        {site.parameter: change for site, change in changes.items()},
        frozenset(site.parameter for site in task.sites if site.transposed),
        provenance("keel", host, requests, config, work, **notes(facts)),
        records,
        {**task.state, **past},
    )


def _rows(task: _Task, own: Sequence[OwnText]) -> list[_Row]:
    """Return each request's prompt, bare and behind prefixes, and its own statements, with the request's index."""
    config = task.config
    groups = [(config.contexts, config.context_tokens)] if config.contexts else []
    contexts = task.work.contexts(task.host, groups, "flat", config.prefixes)
    problems = value_problems(task.host, task.requests, contexts, merge=False, end=config.end)
    pairs = zip(problems, own, strict=True)
    texts = [training_rows(task.host, one.rows, text, end=config.end) for one, text in pairs]
    return [(row, i) for i, group in enumerate(texts) for row in group]


def _find_changes(
    task: _Task, rows: Sequence[_Row], costs: Mapping[Site, CostMatrix], kept: Mapping[Site, Tensor]
) -> tuple[dict[Site, Tensor], dict[Site, LowRank], dict[str, float]]:
    """Return keys ``[d_in, n]`` and change of each site, and the loss, the steps and the cost; ``kept``: terms of M."""
    host, config, sites = task.host, task.config, task.sites
    with hooks.frozen(host.model):
        descent = LowRankDescent(
            host, [line_of(row) for row, _ in rows], [row.loss_weight for row, _ in rows], [i for _, i in rows],
            sites, batch_size=task.work.batch_size,
        )  # fmt: skip
        first = descent.first_pass()
        keys = {
            site: torch.cat(
                [of_row[row.position :] for of_row, (row, _) in zip(read, rows, strict=True)]
            ).mT.cpu()
            for site, read in first.inputs.items()
        }
        bases = {
            site: _basis(keys[site], costs[site], task.state.get(_name(site)), config.history, kept.get(site))
            for site in sites
        }
        fitted = descent.run(
            first, bases, steps=config.steps, stop_loss=config.stop_loss, step_limit=config.step_limit,
            tick=lambda done, total: task.work.on_progress("keel", done, total),
        )  # fmt: skip
    parts = {site: LowRank(fitted.outer[site].cpu(), basis.mT) for site, basis in bases.items()}
    return keys, {site: part.cut(config.energy) for site, part in parts.items()}, fitted.facts()


# --- where a change may go ------------------------------------------------------------------


def _name(site: Site) -> str:
    return f"{site.parameter}.history"


def _basis(keys: Tensor, cost: CostMatrix, past: Tensor | None, weight: float, own: Tensor | None) -> Tensor:
    """Return A ``[d_in, r]``, orthonormal under the cost with earlier keys and those of own statements in it."""
    solved = cost.solve(keys)
    parts = [] if past is None or weight == 0 else [past.to(keys.dtype) * weight**0.5]
    parts += [] if own is None else [own]
    if parts:
        more = condense(torch.cat(parts, 1)).to(keys.dtype)  # [d_in, p]: M is the shrunken C and P P^T
        solved = solve_with_history(solved, more, cost.solve(more))
    return key_basis(keys, solved).to(keys.dtype)


def _history(past: Tensor | None, keys: Tensor) -> Tensor:
    """Return P ``[d_in, p]`` with P P^T the sum of all edits' mean outer products; never wider than high."""
    history = keys if past is None else torch.cat([past.to(keys.dtype), keys], 1)
    return condense(history).to(keys.dtype)


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
