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
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.shape import condense
from errata.locate.own import kept_keys
from errata.methods._consolidate import consolidate, is_due, record_changes
from errata.methods._kernel import KernelSettings, find_changes, text_rows
from errata.methods._method import (
    Method,
    Workspace,
    check_requests,
    notes,
    provenance,
    resolve_layers,
    wide_layers,
)
from errata.methods._rehearse import Rehearsal, rehearse
from errata.methods._settings import JointRequests, OwnStatements, at_least_zero
from errata.methods._statements import cost_terms, own_statements
from errata.types import Request


@dataclass(frozen=True)
class Config(KernelSettings, OwnStatements, Rehearsal, JointRequests):
    """Settings of KEEL."""

    history: float = 0.1
    """Weight in M of each earlier fit's keys, the mean over its texts of the sum of k k^T; 0 forgets them."""
    consolidate: int = 0
    """After how many requests of a sequence the whole change is solved anew from all records; 0: never."""
    records: bool = True
    """Whether the edit keeps each request's keys and the outputs at them, for retract and refit; they triple it."""
    gamma: float = 0.01
    """Ridge of a refit: how much the cost under M counts beside the squared error of the outputs recorded."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [
            *self.kernel_problems(),
            *positive(self, "gamma", "joint"),
            *at_least_zero(self, "history", "consolidate"),
            *self.own_problems(),
            *self.rehearsal_problems(),
        ]
        if self.consolidate and not self.records:
            complaints.append("consolidate: needs records=true")
        if self.consolidate and self.rehearsal:
            complaints.append("consolidate: it would undo what rehearsal preserves; set one of the two to 0")
        if self.rehearsal and (self.consequences or self.inverses):
            complaints.append("rehearsal: its texts contradict consequences and inverses; set those to 0")
        return complaints


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> WeightEdit:
    """Return the edit that lowers the loss of all requests' targets at the least cost under M."""
    check_requests("keel", requests)
    layers = resolve_layers(host, config.layers, wide_layers)
    config = replace(config, layers=layers)
    sites = [host.layout.site(layer) for layer in layers]
    costs = work.costs(host, sites, config.tokens, ridge=config.rho, source=config.moments)
    own = own_statements(host, requests, config, work)
    rows = text_rows(host, requests, own, config, work)
    statement_keys, statement_owners = kept_keys(host, own, sites, anchors=config.anchors, mates=config.mates)
    state: Mapping[str, Tensor] = work.after.state if work.after else {}
    earlier = {site: state[_name(site)] for site in sites if _name(site) in state}
    weighted = {site: keys * config.history**0.5 for site, keys in earlier.items() if config.history}
    terms = {
        site: torch.cat([part[site] for part in (weighted, statement_keys) if site in part], 1)
        for site in sites
        if site in weighted or site in statement_keys
    }
    kernel = find_changes(host, rows, sites, costs, terms, config, work)
    keys, facts = kernel.keys, dict(kernel.facts)
    changes: dict[Site, Delta] = dict(kernel.changes)
    if config.rehearsal:
        dense = {s: change.dense().to(host.device_of(s)) for s, change in kernel.changes.items()}
        facts |= rehearse(host, requests, dense, costs, config, work)
        changes = {site: change.cpu() for site, change in dense.items()}
    records: dict[str, Record] = {}
    if config.records:
        owners = [i for row, i in rows for _ in row.ids[row.position :]]
        terms = {
            site: cost_terms(columns.cpu(), statement_owners) for site, columns in statement_keys.items()
        }
        exact = not config.rehearsal
        records = record_changes(
            changes, keys, costs, owners, work.after, gamma=config.gamma, exact=exact, terms=terms
        )
    if is_due(len(requests), work.after, config.consolidate):
        changes = consolidate(records, costs, work.after)
    share = 1 / len(rows) ** 0.5  # the mean over the texts of this fit
    past = {_name(s): _history(earlier.get(s), keys[s] * share) for s in sites}
    return WeightEdit(
        {site.parameter: change for site, change in changes.items()},
        frozenset(site.parameter for site in sites if site.transposed),
        provenance("keel", host, requests, config, work, **notes(facts)),
        records,
        {**state, **past},
    )


def _name(site: Site) -> str:
    return f"{site.parameter}.history"


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
