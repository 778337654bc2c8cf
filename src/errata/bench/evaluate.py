"""Evaluate a method or given edits on cases: a benchmark run of one cell, on an open host."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from errata.bench import cells, eval_folder, health, results, sources, summing
from errata.bench.cells import CellFolder, Refused
from errata.bench.plan import Cell, Plan
from errata.bench.recipe import ModelSpec, Recipe
from errata.bench.results import finite
from errata.bench.runner import with_probes
from errata.bench.schedule import SINGLE, Schedule
from errata.bench.worker_state import Live, WorkerState
from errata.edits import group as groups
from errata.edits.edit import Edit, versions
from errata.errors import ConfigError
from errata.evaluation import score
from errata.host.host import Host
from errata.host.images import ImageHost
from errata.host.kinds import check_asked
from errata.job import prepare, with_prompt_options, workspace
from errata.progress import OnProgress, ignore
from errata.types import DEFAULT_ASK, AskOptions, Case, Corpus, Row

NAME = "eval"
"""Name of the cell and of the run."""


@dataclass(frozen=True)
class Checkpoint:
    """A host evaluated with several edits in place."""

    edits: int
    """Number of edits in place: in a sequence all so far, in a batch those of one group."""
    summary: Mapping[str, Mapping[str, Any]]
    """Averages over the cases of these edits, as in :class:`Report`."""
    perplexity_before: float
    """Perplexity per token of neutral text, without any edit."""
    perplexity_after: float
    """The same with the edits in place; infinite if the host's outputs overflow."""
    last_batch_efficacy: float | None
    """Share of the most recently fitted requests that free generation answers with the target, before later edits can
    undo them. None if the cases have no efficacy probes."""
    fit_seconds: float
    """Time spent on fits since the run began."""
    norm: float | None
    """Frobenius norm of all changes of weights."""
    digest: str | None
    """Digest of the edit that contains them all."""
    routing_drift: float | None = None
    """Of a model with stacked experts, the share of neutral tokens and layers whose set of experts the edits change."""


@dataclass(frozen=True)
class Report:
    """Results of an evaluation: averages, every row, and its cost."""

    summary: Mapping[str, Mapping[str, Any]]
    """``{"<kind>.<protocol>": {"before", "after", "n", "ci"}}``; of a sequence, at its end."""
    rows: Sequence[Row]
    """Every row; of a sequence, those of all checkpoints, each with its number of edits in the detail."""
    meta: Mapping[str, Any]
    """Times, memory, versions, seed, host and method."""
    checkpoints: Sequence[Checkpoint] = ()
    """Evaluations with several edits in place, in order; empty if cases are edited one by one."""

    def to_dict(self) -> dict[str, Any]:
        """Return one JSON-ready document.

        ``{"summary", "rows", "meta"}``, and ``"checkpoints"`` if there are any: a list of ``{"edits", "summary",
        "perplexity_before", "perplexity_after", "last_batch_efficacy", "fit_seconds", "norm", "digest",
        "routing_drift"}``, see :class:`Checkpoint`. In the rows of a sequence, ``detail["checkpoint"]`` is the
        checkpoint's ``edits``. JSON cannot represent numbers that are not finite: they become the texts ``"inf"``,
        ``"-inf"`` and ``"nan"``, which ``float`` reads.
        """
        document: dict[str, Any] = {
            "summary": {name: dict(entry) for name, entry in self.summary.items()},
            "rows": [asdict(row) for row in self.rows],
            "meta": dict(self.meta),
        }
        if self.checkpoints:
            document["checkpoints"] = [asdict(point) for point in self.checkpoints]
        return finite(document)


def evaluate(
    host: Host, cases: Sequence[Case], *, method: str | None = None,
    edit: Edit | Sequence[Edit] | None = None, options: Mapping[str, Any] | None = None, seed: int = 0,
    schedule: Schedule = SINGLE, at: str | Sequence[int] | None = None, probes: Sequence[str] | None = None,
    after: Edit | None = None, keep: Callable[[Report, Edit], None] | None = None,
    ask: AskOptions = DEFAULT_ASK, corpus: str | os.PathLike[str] | Corpus | None = None,
    examples: str | Sequence[Case] | None = None, run_folder: str | os.PathLike[str] | None = None,
    on_progress: OnProgress = ignore,
) -> Report:  # fmt: skip
    """Evaluate a method on a schedule, or given edits, all in place together, on all cases.

    See :func:`errata.evaluate`. The host's weights are restored; ``meta["weights_restored"]`` says whether their bytes
    were verified to be the same. Raises ConfigError for arguments that exclude each other.
    """
    check_asked(host.name, host.kind, "an evaluation")
    if isinstance(host, ImageHost):
        raise ConfigError(
            f"cases are texts, and {host.name} is an image classifier: compare host.logits(images)"
        )
    edits = groups.group(edit)
    _check_arguments(method, edits is not None, cases, options, schedule, at, after, keep)
    cases = with_probes(cases, probes)
    score.check_packages(cases)
    work, job = None, None
    if method is not None:
        job = prepare(
            host, [request for case in cases for request in case.requests], method=method, options=options,
            seed=seed, after=after, corpus=corpus, examples=examples, ask=ask, on_progress=on_progress,
        )  # fmt: skip
        host, work = job.host, job.work
    else:
        host = with_prompt_options(host, ask, edits=edits.edits if edits else ())
        work = workspace(host, seed=seed, corpus=corpus, examples=examples, on_progress=on_progress)
    reasoned = ask.thinking == "forced" or ask.thinking_template is not None  # no part of a prompt format
    resolved = host.prompt_format.to_dict() | ({"thinking": ask.thinking} if reasoned else {})
    ask = replace(ask, **resolved)
    live = Live(host, cases, work, ask, job, edits)
    marks = schedule.checkpoints(len(cases), at) if schedule.kind == "sequential" else None
    plan = _plan(live, options or {}, schedule, marks)
    lasting = run_folder is not None
    with _folder(run_folder) as folder:
        if lasting:
            settings = eval_folder.describe(live, plan.cells[0], after, own_examples=examples is not None)
            eval_folder.create_or_resume(folder, plan, settings)
        return _run(folder, plan, live, dict(options or {}), after, keep, on_progress, lasting)


def _check_arguments(
    method: str | None, edited: bool, cases: Sequence[Case], options: Mapping[str, Any] | None,
    schedule: Schedule, at: Any, after: Edit | None, keep: Any,
) -> None:  # fmt: skip
    """Raise ConfigError for arguments that exclude or require each other."""
    if method is None and options:
        raise ConfigError(f"settings {sorted(options)} need a method")
    if (method is None) != edited:
        raise ConfigError("evaluate takes either a method or an edit")
    if not cases:
        raise ConfigError("evaluate needs at least one case")
    if schedule.kind != "sequential" and any(option is not None for option in (at, after, keep)):
        raise ConfigError(
            f"checkpoints, and edits to keep or continue from, require the schedule sequential:N, found {schedule}"
        )
    if edited and schedule != SINGLE:
        raise ConfigError(f"a given edit is evaluated without a schedule, found {schedule}; leave it out")


def _plan(live: Live, options: Mapping[str, Any], schedule: Schedule, marks: tuple[int, ...] | None) -> Plan:
    """Return a plan of one cell for an open host and cases in memory."""
    host, ask = live.host, live.ask
    model = ModelSpec(host.name, label=host.name, template=ask.template or "raw")
    recipe = Recipe(NAME, (model,), (), (live.work.seed,), max_new_tokens=ask.max_new_tokens)
    method = live.edit.method if live.edit is not None else live.job.method.name if live.job else ""
    label = method if live.edit is None else _count(live)
    facts = {
        "source": NAME, "together": schedule.together, "sha256": sources.digest(live.cases),
        "rows": len(live.cases), "cases": len(live.cases), "check": {}, "demonstrations": [], "beside": [],
    }  # fmt: skip
    cell = Cell(
        NAME, host.name, method, label, dict(options), NAME, str(schedule), marks, live.work.seed, False
    )
    return Plan(recipe, {NAME: facts}, (cell,))


@contextlib.contextmanager
def _folder(folder: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Yield a run folder; without a name a temporary one, deleted after the block."""
    if folder is not None:
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory(prefix="errata-eval-") as temporary:
        yield Path(temporary)


def _run(
    folder: Path, plan: Plan, live: Live, options: dict[str, Any], after: Edit | None,
    keep: Callable[[Report, Edit], None] | None, tick: OnProgress, lasting: bool,
) -> Report:  # fmt: skip
    """Run the one cell of a run folder, or the rest of it, and return the report on all its rows."""
    (cell,) = plan.cells
    worker = WorkerState(folder, plan, live, health=lasting, tick=tick)
    report = _Report(worker, cell, options, after, keep)
    cell_folder = CellFolder(
        folder / results.CELLS / cell.id, cell, guard=lambda: None, after=after, on_record=report.add,
        on_edit=report.checkpoint, saves=lasting,
    )  # fmt: skip
    document = eval_folder.finished_document(folder, cell) if lasting else None
    if document is not None:
        for record in cell_folder.journal.records():
            report.add(record)
        return report.report(restored=bool(document["weights_restored"]))
    with eval_folder.lease(folder, cell) if lasting else contextlib.nullcontext() as lease:
        if lease is not None:
            cell_folder.guard = lease.check
        try:
            measured = cells.run(worker, cell, cell_folder, tick)
        except Refused as refused:  # a run records it, an evaluation raises it
            raise refused.__cause__ or refused from None
        restored = bool(worker.restored())
        if lasting:
            document = summing.document(worker, cell, cell_folder.journal, measured)
            cell_folder.end({**document, "weights_restored": restored}, keep_edits=False)
    return report.report(restored=restored)


def _count(live: Live) -> str:
    """Return the text that tables show in place of a schedule."""
    count = 0 if live.edit is None else len(live.edit.edits)
    return "given edit" if count == 1 else f"{count} given edits"


@dataclass
class _Report:
    """Collects the records of a cell as they are written, and reports on those so far."""

    worker: WorkerState
    cell: Cell
    options: dict[str, Any]
    after: Edit | None
    """The edit of a sequence's first cases."""
    keep: Callable[[Report, Edit], None] | None
    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)
    rows: list[Row] = field(default_factory=list)
    points: list[Checkpoint] = field(default_factory=list)
    fit_seconds: dict[str, float] = field(default_factory=dict)
    """By case, for the cases fitted in this process."""
    observe_seconds: list[float] = field(default_factory=list)
    neutral: dict[str, int] = field(default_factory=dict)
    """Number of texts and tokens on which perplexity is measured."""
    _since: int = 0
    """Number of rows before the last checkpoint."""

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a record of the cell in the form that :mod:`errata.bench.cells` writes."""
        if record["type"] == "case":
            self.rows += [results.row_of(row) for row in record["rows"]]
            cost = record["cost"]
            self.observe_seconds.append(cost["observe_seconds"])
            if cost["fit_seconds"] is not None:
                self.fit_seconds[record["case"]] = cost["fit_seconds"]
            return
        neutral = self.worker.neutral(self.cell)
        self.neutral = {"texts": len(neutral.texts), "tokens": neutral.tokens}
        table, self._since = self.rows[self._since :], len(self.rows)
        names = (
            "edits",
            "perplexity_before",
            "perplexity_after",
            "last_batch_efficacy",
            "fit_seconds",
            "norm",
        )
        values = [record[name] for name in names]
        numbers: Any = [
            float(n) if isinstance(n, str) else n for n in values
        ]  # "inf" and "nan", as JSON has them
        summary = score.summarise(table, seed=self.cell.seed)
        point = dict(zip(names, numbers, strict=True))
        drift = record.get("routing_drift")
        self.points.append(Checkpoint(summary=summary, digest=record["digest"], routing_drift=drift, **point))

    def checkpoint(self, edit: Edit) -> None:
        """Pass the report so far and the edit of a sequence to ``keep``."""
        if self.keep is not None:
            self.keep(self.report(restored=None), edit)

    def report(self, *, restored: bool | None) -> Report:
        """Return the report on all records so far; ``restored`` None: the evaluation is not finished."""
        cell, live = self.cell, self.worker.live
        assert live is not None
        kind = cell.plan.kind
        sequence = kind == "sequential"
        summary = self.points[-1].summary if sequence else score.summarise(self.rows, seed=cell.seed)
        meta: dict[str, Any] = {
            "cases": len(live.cases),
            "method": cell.method,
            "schedule": cell.schedule if live.edit is None else _count(live),
            "options": self.options,
            "asking": live.ask.to_dict(),
            "seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
            "fit_seconds_per_case": math.fsum(self.fit_seconds.values()) / max(1, len(self.fit_seconds)),
            "observe_seconds_per_case": math.fsum(self.observe_seconds) / max(1, len(self.observe_seconds)),
            "peak_memory_mb": health.peak_mb(live.host),
            "versions": versions(),
            "seed": cell.seed,
            "host": live.host.name,
            "host_fingerprint": live.host.fingerprint,
            "weights_restored": restored,
            "rome_scores": score.rome_scores(summary),
        }
        if kind != "single":
            meta["perplexity_of"] = self.neutral
        if sequence:
            meta["finished"] = restored is not None
            meta["after"] = None
            if self.after is not None:
                edits = len(self.after.provenance.requests)
                meta["after"] = {"digest": self.after.digest, "edits": edits}
        return Report(summary, list(self.rows), meta, tuple(self.points))
