"""One cell of a run: evaluates its cases and saves the rows of each, continuing an earlier attempt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from errata.bench import health, summing
from errata.bench.plan import Cell
from errata.bench.results import FILES, ROWS, Journal, hashes, read_document, write_sealed
from errata.bench.runner import CheckpointResult, EvaluatedCase, check_schedule, count_edited_cases
from errata.bench.worker_state import WorkerState
from errata.edits.edit import Edit
from errata.errors import ConfigError, DataError, EditError, HostError, RequestError, shown
from errata.evaluation.metrics import routing
from errata.evaluation.observe import check as check_probes
from errata.job import Job
from errata.progress import OnProgress, ignore
from errata.types import Case

START = "start.json"
"""File with the fingerprint of the host that a cell's rows were measured on."""


class Refused(ConfigError):
    """A method does not support a cell; raised before anything is measured."""


@dataclass
class CellFolder:
    """The folder of a cell while results are written to it."""

    folder: Path
    cell: Cell
    guard: Callable[[], None]
    """Raises LeaseLost if another worker has taken over the cell."""
    completed: int = 0
    """Number of cases that need not be fitted again."""
    fits: list[float | None] = field(default_factory=list)
    """Seconds for fitting each of those cases."""
    edit: Edit | None = None
    """In a sequence, the edit of those cases."""
    after: Edit | None = None
    """In a sequence, an edit of its first cases to continue from if the folder has none."""
    on_record: Callable[[dict[str, Any]], None] = ignore
    """Called with every record of a case or checkpoint: those of an earlier attempt, then each one written."""
    on_edit: Callable[[Edit], None] = ignore
    """In a sequence, called with the edit of every checkpoint after its records are written."""
    saves: bool = True
    """Whether records and edits are written to the folder, so that a stopped cell can be continued."""
    finished: bool = False
    """Whether all cases are evaluated."""

    @property
    def journal(self) -> Journal:
        """The rows."""
        return Journal(self.folder / ROWS)

    def begin(self, fingerprint: str, cases: Sequence[Case]) -> None:
        """Determine where to continue; a damaged folder is started again.

        Raises DataError if the rows were measured on another host.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        start = self.folder / START
        try:
            recorded_fingerprint = read_document(start).get("host_fingerprint") if start.exists() else None
            self._check_order(cases)
        except DataError:
            self.void()
            recorded_fingerprint = None
        if recorded_fingerprint is None:
            write_sealed(start, {"host_fingerprint": fingerprint})
        elif recorded_fingerprint != fingerprint:
            raise DataError(
                f"cell {self.cell.id} was started on host {shown(recorded_fingerprint)}, the model is now "
                f"{fingerprint}: use the model it was started with, or start a new run"
            )
        kind = self.cell.plan.kind
        if kind == "sequential":
            self._begin_sequence(len(cases))
        else:
            self._begin_groups(kind)
            self.finished = self.completed == len(cases)

    def _check_order(self, cases: Sequence[Case]) -> None:
        """Raise DataError unless the saved rows are those of the first cases, in order."""
        place, sequence = 0, self.cell.plan.kind == "sequential"
        for line in self.journal:
            if line.record.get("type") == "look":
                place = 0 if sequence else place
                continue
            if place >= len(cases) or line.record.get("case") != cases[place].id:
                raise DataError(
                    f"{self.journal.path} is damaged: expected rows of case {place + 1}, found those of "
                    f"{shown(line.record.get('case'))}; remove the file to start its cell again"
                )
            place += 1

    def _begin_groups(self, kind: str) -> None:
        """Keep complete cases, in batches complete groups with their checkpoint; remove the rest."""
        end = 0
        fits: list[float | None] = []
        for line in self.journal:
            if line.record["type"] == "case":
                fits.append(line.record["cost"]["fit_seconds"])
            if kind == "single" or line.record["type"] == "look":
                end, self.completed = line.end, len(fits)
        self.fits = fits[: self.completed]
        self.journal.cut(end)

    def _begin_sequence(self, count: int) -> None:
        """Keep everything up to the last checkpoint whose edit is saved; remove the rest."""
        end = 0
        fits: list[float | None] = []
        for line in self.journal:
            if line.record["type"] == "case":
                fits.append(line.record["cost"]["fit_seconds"])
                continue
            edits = int(line.record["edits"])
            if self.edit_file(edits).exists():
                end, self.completed, self.fits = line.end, edits, fits
            fits = []
        self.journal.cut(end)
        for path in self._edit_files():
            if path != self.edit_file(self.completed):
                path.unlink()
        if self.completed:
            try:
                self.edit = Edit.load(self.edit_file(self.completed))
            except EditError:  # damaged: nothing to continue from
                self.void()
                self.completed, self.fits = 0, []
        self.finished = self.completed == count

    def edit_file(self, edits: int) -> Path:
        """Return the path of the edit of the first ``edits`` cases."""
        return self.folder / f"edit-{edits}.safetensors"

    def _edit_files(self) -> list[Path]:
        return sorted(self.folder.glob("edit-*.safetensors"))

    def void(self) -> None:
        """Remove all rows and edits: they were measured on a host whose weights had changed."""
        self.journal.cut(0)
        for path in self._edit_files():
            path.unlink()

    def write(self, *records: dict[str, Any]) -> None:
        """Append lines to the rows."""
        self.guard()
        if self.saves:
            self.journal.append(*records)
        for record in records:
            self.on_record(record)

    def keep(self, edits: int, edit: Edit) -> None:
        """Save a sequence's newest edit, after its rows, and remove the older ones."""
        self.guard()
        self.on_edit(edit)
        if not self.saves:
            return
        edit.save(self.edit_file(edits))
        for path in self._edit_files():
            if path != self.edit_file(edits):
                path.unlink()

    def end(self, document: dict[str, Any], *, keep_edits: bool) -> None:
        """Write the cell's summary, and remove the edit that was saved for resuming unless ``keep_edits``."""
        self.guard()
        edit_names = [path.name for path in self._edit_files()] if keep_edits else []
        document = {**document, FILES: hashes(self.folder, [ROWS, *edit_names])}
        document[FILES][ROWS]["lines"] = sum(1 for _ in self.journal)
        write_sealed(self.folder / summing.CELL, document)
        for path in self._edit_files():
            if not keep_edits:
                path.unlink()


def run(worker: WorkerState, cell: Cell, cell_folder: CellFolder, tick: OnProgress) -> dict[str, Any]:
    """Evaluate a cell, write its rows and return the further measurements that its summary needs.

    Raises Refused if the method does not support the cell; other errors are raised unchanged.
    """
    host = worker.host(cell)
    health.reset_peak(host)
    try:
        check_probes(host, worker.cases(cell), worker.ask(cell))
        job = worker.job(cell)
        if job is not None:
            check_schedule(job.method, cell.plan, host)
    except (ConfigError, RequestError) as error:
        raise Refused(str(error)) from error
    cell_folder.begin(host.fingerprint, worker.cases(cell))
    for record in cell_folder.journal.records():
        cell_folder.on_record(record)
    edit = cell_folder.edit
    if not cell_folder.finished:
        _check_start(worker, cell, cell_folder)
        edit = _fill(worker, cell, cell_folder, tick, job)
    return summing.measured(host, edit, worker.neutral(cell).prompts)


def _check_start(worker: WorkerState, cell: Cell, cell_folder: CellFolder) -> None:
    """Set the number of cases that the edit to continue from covers. Raises DataError unless the rows agree."""
    edit = cell_folder.edit or cell_folder.after
    if edit is None:
        return
    count = count_edited_cases(edit, worker.cases(cell), cell.plan, cell.seed)
    if cell_folder.edit is not None and count != cell_folder.completed:
        raise DataError(
            f"the saved edit of {cell.id} covers {count} cases, its rows {cell_folder.completed}; start a new run"
        )
    cell_folder.edit, cell_folder.completed = edit, count


def _fill(
    worker: WorkerState, cell: Cell, cell_folder: CellFolder, tick: OnProgress, job: Job | None
) -> Edit | None:
    """Fit and evaluate the remaining cases; return the last edit."""
    neutral, lenient = worker.neutral(cell), worker.live is None
    engine = worker.engine(
        cell, job, texts=neutral.texts, prompts=neutral.prompts, lenient=lenient, tick=tick
    )
    engine.fit_seconds = math.fsum(seconds for seconds in cell_folder.fits if seconds is not None)
    sequence = cell.plan.kind == "sequential"
    edit: Edit | None = None
    first = not cell_folder.completed
    try:
        with closing(
            engine.events(cell.look or (), cell_folder.completed, cell_folder.edit, cell_folder.fits or None)
        ) as events:
            for event in events:
                edit, first = event.edit or edit, False
                if isinstance(event, EvaluatedCase):
                    cell_folder.write(_case_record(event))
                    continue
                cell_folder.write(_checkpoint_record(worker, cell, event, engine.fit_seconds))
                if sequence:
                    cell_folder.keep(event.edits, event.edit)
    except (ConfigError, HostError, RequestError) as error:
        if first:
            raise Refused(str(error)) from error
        raise
    if not lenient:
        return edit
    reasons = [line.record.get("refused") for line in cell_folder.journal if line.record["type"] == "case"]
    if all(reasons):  # nothing was edited, so there is nothing to compare
        cell_folder.void()
        raise Refused(f"none of {len(reasons)} cases can be edited; the first: {reasons[0]}")
    return edit


def _case_record(result: EvaluatedCase) -> dict[str, Any]:
    """Return the line of a case."""
    line = {
        "type": "case",
        "case": result.case.id,
        "edits": result.edits,
        "rows": [asdict(row) for row in result.rows],
        "cost": {
            "fit_seconds": result.fit_seconds,
            "observe_seconds": result.observe_seconds,
            "bytes": result.edit.size if result.edits is None and result.edit is not None else None,
        },
    }
    return line if result.refused is None else {**line, "refused": result.refused}


def _checkpoint_record(
    worker: WorkerState, cell: Cell, checkpoint: CheckpointResult, fit_seconds: float
) -> dict[str, Any]:
    """Return the line of a checkpoint."""
    neutral, host = worker.neutral(cell), worker.host(cell)
    sizes = health.weights(checkpoint.edit, host, ratios=worker.health)
    return {
        "type": "look",
        "edits": checkpoint.edits,
        "perplexity_before": neutral.perplexity,
        "perplexity_after": checkpoint.perplexity,
        "routing_drift": routing.drift(zip(neutral.routes, checkpoint.routes, strict=True)),
        "last_batch_efficacy": checkpoint.last_batch_efficacy,
        "fit_seconds": fit_seconds,
        **sizes,
        "digest": checkpoint.edit.digest,
        "bytes": checkpoint.edit.size,
        "collapse": health.condition(
            checkpoint.continued, neutral.continued, (neutral.perplexity, checkpoint.perplexity),
            list((sizes["norm_ratio"] or {}).values()),
        ) if worker.health else None,
    }  # fmt: skip
