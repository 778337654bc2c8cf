"""The state of a worker: one open model, its workspaces, cases, and its unedited answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench import health, results, sources
from errata.bench.plan import Cell, Plan
from errata.bench.runner import Engine, count_tokens, neutral_texts
from errata.bench.unedited import Unedited
from errata.edits.group import EditGroup
from errata.errors import DataError
from errata.evaluation.metrics import perplexity
from errata.evaluation.observe import text_routes
from errata.host.kinds import CAUSAL
from errata.host.prompts import PromptFormat, prompt_format
from errata.job import Job, prepare, workspace
from errata.loading import load
from errata.progress import OnProgress, ignore
from errata.types import AskOptions, Case

if TYPE_CHECKING:  # methods are reached through the registry only
    from errata.host.host import Host
    from errata.methods._method import Workspace


@dataclass(frozen=True)
class Live:
    """Host, cases and job of an evaluation in this process; a benchmark run opens and prepares its own."""

    host: Host
    cases: Sequence[Case]
    work: Workspace
    ask: AskOptions
    job: Job | None = None
    """Fits the cases' requests; None if edits are given."""
    edit: EditGroup | None = None
    """Given edits to evaluate."""


@dataclass(frozen=True)
class Neutral:
    """Text unrelated to any edit, with the unedited host's perplexity and continuations."""

    texts: Sequence[str]
    tokens: int
    perplexity: float
    prompts: Sequence[str]
    """Open prompts."""
    continued: Sequence[str]
    routes: Sequence[Any] = ()
    """Of each text, the experts of its tokens; empty for a model without stacked experts."""


@dataclass
class WorkerState:
    """Opens the model and data that cells need, and reuses them for later cells."""

    folder: Path
    plan: Plan
    live: Live | None = None
    """Host and cases of an evaluation in this process; None: they are opened."""
    health: bool = True
    """Whether to measure open texts, spectra of weights and latency in addition to the rows."""
    tick: OnProgress = ignore
    _model: str | None = None
    _host: Any = None
    _hash: str = ""
    _works: dict[int, Any] = field(default_factory=dict)
    _neutral: dict[int, Neutral] = field(default_factory=dict)
    _cases: dict[str, Sequence[Case]] = field(default_factory=dict)
    _unedited: dict[str, Unedited] = field(default_factory=dict)

    def host(self, cell: Cell) -> Host:
        """Return a cell's model, opening it if necessary."""
        if self._model != cell.model:
            self.close()
            spec = self.plan.model(cell.model)
            if self.live is not None:
                self._host = self.live.host
            else:
                host = load(spec.name, device=spec.device, dtype=spec.dtype)
                # the same format for fits and probes
                self._host = host.with_prompt_format(prompt_format(PromptFormat(), self.ask(cell)))
            self._model, self._hash = cell.model, self._host.weights_hash()
        return self._host

    def close(self) -> None:
        """Release the model and everything that depends on it."""
        self._model, self._host = None, None
        for cache in (self._works, self._neutral, self._unedited):
            cache.clear()

    def restored(self) -> bool | None:
        """Whether the model's weights are bit-identical to when it was opened; if not, it is closed.

        None: no model is open.
        """
        if self._host is None:
            return None
        same = self._host.weights_hash() == self._hash
        if not same:
            self.close()
        return same

    def job(self, cell: Cell) -> Job | None:
        """Return the job that fits a cell's cases; None if edits are given. Raises ConfigError as ``prepare`` does.

        Requests are not checked here: a case that the host cannot take counts as refused when it is fitted.
        """
        if self.live is not None:
            return self.live.job
        requests = [request for case in self.cases(cell) for request in case.requests]
        return prepare(
            self.host(cell),
            requests,
            method=cell.method,
            options=cell.settings,
            work=self.work(cell),
            check=False,
        )

    def work(self, cell: Cell) -> Workspace:
        """Return the workspace of a cell's model and seed; sharing it saves time and changes no result."""
        host = self.host(cell)
        if self.live is not None:
            return self.live.work
        if cell.seed not in self._works:
            corpus = self.plan.recipe.corpus
            self._works[cell.seed] = workspace(host, seed=cell.seed, corpus=corpus)
        return self._works[cell.seed]

    def cases(self, cell: Cell) -> Sequence[Case]:
        """Return a cell's cases. Raises DataError if they have changed since the plan was made."""
        if self.live is not None:
            return self.live.cases
        if cell.dataset not in self._cases:
            facts = self.plan.datasets[cell.dataset]
            cases, current_facts = sources.again(facts)
            if current_facts["sha256"] != facts["sha256"]:
                raise DataError(
                    f"dataset {cell.dataset} has changed since the run began: was {facts['sha256'][:12]}, "
                    f"is {current_facts['sha256'][:12]}; start a new run"
                )
            self._cases[cell.dataset] = cases
        return self._cases[cell.dataset]

    def ask(self, cell: Cell) -> AskOptions:
        """Return the options for a cell's probes."""
        if self.live is not None:
            return self.live.ask
        template, recipe = self.plan.model(cell.model).template, self.plan.recipe
        return AskOptions(template, max_new_tokens=recipe.max_new_tokens)

    def unedited(self, cell: Cell) -> Unedited:
        """Return the unedited host's observations of a cell's cases."""
        if cell.dataset not in self._unedited:
            cases = self.cases(cell)
            self._unedited[cell.dataset] = Unedited(
                self.folder / results.UNEDITED, self.host(cell), cases, self.ask(cell),
                chunk=None if self.live is None else len(cases),
                on_progress=lambda completed, total: self.tick("before", completed, total),
            )  # fmt: skip
        return self._unedited[cell.dataset]

    def neutral(self, cell: Cell) -> Neutral:
        """Return neutral text with the unedited host's results on it; empty if the cell does not use them.

        Models that answer prompts score no running text, so their cells use none.
        """
        if cell.plan.kind == "single" and (not self.health or self.host(cell).kind != CAUSAL):
            return Neutral((), 0, math.nan, (), ())
        if cell.seed not in self._neutral:
            texts = neutral_texts(self.host(cell), self.work(cell))
            prompts = health.open_prompts(texts) if self.health else []
            logprobs, continued = self.engine(cell, None, texts=texts, prompts=prompts).health()
            tokens = count_tokens(texts, logprobs)
            self._neutral[cell.seed] = Neutral(
                texts,
                tokens,
                perplexity.of_texts(logprobs),
                prompts,
                continued,
                text_routes(self.host(cell), texts),
            )
        return self._neutral[cell.seed]

    def engine(self, cell: Cell, job: Job | None, **more: Any) -> Engine:
        """Return the engine that fits and observes a cell's cases."""
        edit = None if self.live is None else self.live.edit
        return Engine(
            self.host(cell), self.cases(cell), cell.plan, before=self.unedited(cell).of, job=job, edit=edit,
            ask=self.ask(cell), **more,
        )  # fmt: skip
