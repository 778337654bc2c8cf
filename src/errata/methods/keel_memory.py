"""KEEL_MEMORY: each request's KEEL change acts on prompts that name its subject and ask what it states.

Paper      This project's own method; no paper. The change is that of :mod:`errata.methods.keel`; a memory
           with a scope for each entry is the design of Mitchell et al., "Memory-Based Model Editing at Scale" (SERAC),
           ICML 2022, arXiv 2206.06520
Implements Every request is fitted alone, on the model without edits. Its low-rank changes of all layers are one entry
           of a memory. A prompt takes an entry if it names the subject and a linear gate w x + b on the lowest layer's
           input x at the prompt's last token is above a threshold. The gate is a ridge regression on the model's own
           statements: 1 for the request's template and its paraphrases in the model's tables, -1 for the other
           templates, with names of the subject's type
Departs    An entry acts on all tokens of a row, as the change of the weights would. A request that states what an
           earlier one states takes its place
Needs      As KEEL; tables that the model writes once
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from errata.config import positive
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.routers.statement import Statement
from errata.errors import ConfigError
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.lowrank import LowRank
from errata.locate.own import OwnCounts
from errata.locate.scope import ScopeData
from errata.methods._kernel import KernelSettings, find_changes, text_rows
from errata.methods._memory import stack_low_rank
from errata.methods._method import (
    Method,
    Workspace,
    check_requests,
    notes,
    provenance,
    resolve_layers,
    wide_layers,
    without,
)
from errata.methods._scope import check_named
from errata.types import Request
from errata.writing import folded


@dataclass(frozen=True)
class Config(KernelSettings):
    """Settings of KEEL as a memory."""

    paraphrases: int = 0
    """How many own paraphrases of each request are fitted as well, each with half the prompt's weight."""
    threshold: float = -0.1
    """Least value of the gate for a prompt that names the subject: 1 for statements in scope that it was fitted to, -1
    for those outside; wordings that it does not know lie between. Chosen on the lab, seed 1."""
    gate_names: int = 8
    """Names per template among the statements that the gate is fitted to."""

    def problems(self) -> list[str]:
        """Check ranges."""
        complaints = [*self.kernel_problems(), *positive(self, "gate_names")]
        if self.paraphrases < 0:
            complaints.append(f"paraphrases: expected 0 or more, found {self.paraphrases}")
        if not -1 < self.threshold < 1:
            complaints.append(f"threshold: expected a value between -1 and 1, found {self.threshold}")
        return complaints


@dataclass
class _Entries:
    """What the memory holds: of each entry its subject, gate, the state of its own prompt, and its changes."""

    sites: Sequence[Site]
    phrases: list[str]
    weights: list[Tensor]
    biases: list[float]
    states: list[Tensor]
    """The gate's input at each request's own prompt ``[d_in]``."""
    changes: list[list[LowRank]]
    """By entry, the change of each site."""
    log: list[dict[str, Any]]

    def router(self, threshold: float) -> Statement:
        """Return who takes which entry."""
        return Statement(
            tuple(self.phrases), torch.stack(self.weights), torch.tensor(self.biases, dtype=torch.float32), threshold
        )  # fmt: skip

    def replaced(self, number: int, threshold: float) -> int | None:
        """Return the earlier entry that states what an entry states: both prompts are in scope of both gates."""
        for other in reversed(range(number)):
            if self.phrases[other] and folded(self.phrases[other]) == folded(self.phrases[number]):
                pairs = ((self.weights[other], self.biases[other], self.states[number]),
                         (self.weights[number], self.biases[number], self.states[other]))  # fmt: skip
                if all(float(state @ weight) + bias > threshold for weight, bias, state in pairs):
                    return other
        return None


def fit(host: Host, requests: Sequence[Request], config: Config, work: Workspace) -> MemoryEdit:
    """Return the memory of all requests so far, an entry for each."""
    check_requests("keel_memory", requests)
    check_named("keel_memory", requests)
    layers = resolve_layers(host, config.layers, wide_layers)
    config = replace(config, layers=layers)
    sites = [host.layout.site(layer) for layer in layers]
    entries = _load(work.after, sites)
    first = len(entries.phrases)
    counts = OwnCounts(paraphrases=config.paraphrases)
    facts = {"loss": 0.0, "steps": 0.0}
    alone = replace(work, after=None)  # nothing of the earlier entries is in place during the fit
    with without(work.after, host):
        costs = alone.costs(host, sites, config.tokens, ridge=config.rho, source=config.moments)
        texts = alone.own_texts(host, requests, counts)
        data = ScopeData(host, alone.tables(host), sites[0], config.gate_names, work.seed)
        own = data.states([request.text for request in requests])
        for i, request in enumerate(requests):
            rows = text_rows(host, [request], [texts[i]], config, alone)
            kernel = find_changes(host, rows, sites, costs, {}, config, alone)
            gate = data.gate(request)
            entries.phrases.append(request.subject)
            entries.weights.append(gate.weight)
            entries.biases.append(gate.bias)
            entries.states.append(own[i])
            entries.changes.append([kernel.changes[site] for site in sites])
            entry: dict[str, Any] = {"request": first + i, "entry": first + i, "action": "add"}
            other = entries.replaced(first + i, config.threshold)
            if other is not None:
                entry |= {"action": "replace", "other": other, "subject": entries.phrases[other]}
                entries.phrases[other] = ""  # takes no prompt any more
            entries.log.append(entry)
            facts = {name: max(value, kernel.facts[name]) for name, value in facts.items()}
            work.on_progress("entries", i + 1, len(requests))
    record = provenance("keel_memory", host, requests, config, work, **notes(facts))
    return _edit(entries, config, record)


def _load(after: MemoryEdit | None, sites: Sequence[Site]) -> _Entries:
    """Return the entries of an earlier edit, or none."""
    entries = _Entries(sites, [], [], [], [], [], [])
    if after is None:
        return entries
    modules = [one.module for one in after.interventions]
    if modules != [site.name for site in sites] or not isinstance(after.router, Statement):
        raise ConfigError(
            f"the earlier memory is at {', '.join(modules)}, not at {', '.join(s.name for s in sites)}; "
            "use the same layers"
        )
    router = after.router
    entries.phrases = list(router.phrases)
    entries.weights, entries.biases = list(router.weights), router.biases.tolist()
    entries.states = list(after.state["prompts"])
    entries.log = [dict(entry) for entry in after.log]
    entries.changes = [
        [LowRank(one.payload["left"][i], one.payload["right"][i]) for one in after.interventions]
        for i in range(after.entries)
    ]
    return entries


def _edit(entries: _Entries, config: Config, record: Any) -> MemoryEdit:
    interventions = tuple(
        Intervention(site.name, "lowrank", stack_low_rank([changes[i] for changes in entries.changes]), "all")
        for i, site in enumerate(entries.sites)
    )
    state = {"prompts": torch.stack(entries.states)}
    return MemoryEdit(interventions, entries.router(config.threshold), record, state, tuple(entries.log))


METHOD = Method(
    name="keel_memory",
    title="KEEL memory",
    paper="Kernel edits as a memory: this project's own method; the change is KEEL's, scoped entries as in SERAC, "
    "ICML 2022, arXiv 2206.06520",
    config=Config,
    fit=fit,
    undo="any",
    gives=MemoryEdit,
    batch=True,
    sequential=True,
    cumulative=True,
    needs=("second_moment", "gradients", "tables"),
)
