"""One cell of a run: rows to its folder as they are made, from where an earlier attempt left off."""

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
from errata.bench.rooms import Room
from errata.bench.runner import Look, Seen, Tick, check_schedule, count_edited_cases
from errata.edits.edit import Edit
from errata.errors import ConfigError, DataError, EditError, HostError, RequestError, shown
from errata.evaluation.observe import check as check_probes
from errata.job import Job
from errata.types import Case

START = "start.json"
"""Which host a cell's rows are of."""


class Refused(ConfigError):
    """A method cannot do what a cell asks; said before anything was measured."""


@dataclass
class Sheet:
    """The folder of a cell while it is filled."""

    folder: Path
    cell: Cell
    guard: Callable[[], None]
    """Raises where the cell belongs to somebody else by now."""
    done: int = 0
    """Cases that need no fitting again."""
    fits: list[float | None] = field(default_factory=list)
    """What fitting those took."""
    edit: Edit | None = None
    """Of a sequence, the edit of those."""
    after: Edit | None = None
    """Of a sequence, an edit of its first cases from elsewhere, to continue from where the folder has none."""
    on_record: Callable[[dict[str, Any]], None] = lambda record: None
    """Called with every record of a case or checkpoint: those of an earlier attempt, then each one written."""
    on_edit: Callable[[Edit], None] = lambda edit: None
    """Of a sequence, called with the edit of every checkpoint once its records were written."""
    saves: bool = True
    """Whether records and edits are written to the folder, so that a stopped cell can be continued."""
    finished: bool = False
    """Whether nothing is left to be observed."""

    @property
    def journal(self) -> Journal:
        """The rows."""
        return Journal(self.folder / ROWS)

    def begin(self, fingerprint: str, cases: Sequence[Case]) -> None:
        """Find where to go on, at the start where what is there is damaged.

        Raises DataError where the rows are of another host.
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
            self.finished = self.done == len(cases)

    def _check_order(self, cases: Sequence[Case]) -> None:
        """Raise DataError where the rows kept are not those of the first cases, in order."""
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
        """Keep whole cases, and of batches whole groups with their look."""
        end = 0
        fits: list[float | None] = []
        for line in self.journal:
            if line.record["type"] == "case":
                fits.append(line.record["cost"]["fit_seconds"])
            if kind == "single" or line.record["type"] == "look":
                end, self.done = line.end, len(fits)
        self.fits = fits[: self.done]
        self.journal.cut(end)

    def _begin_sequence(self, count: int) -> None:
        """Keep all up to the newest look whose edit is there to go on from."""
        end = 0
        fits: list[float | None] = []
        for line in self.journal:
            if line.record["type"] == "case":
                fits.append(line.record["cost"]["fit_seconds"])
                continue
            edits = int(line.record["edits"])
            if self.edit_file(edits).exists():
                end, self.done, self.fits = line.end, edits, fits
            fits = []
        self.journal.cut(end)
        for path in self._edit_files():
            if path != self.edit_file(self.done):
                path.unlink()
        if self.done:
            try:
                self.edit = Edit.load(self.edit_file(self.done))
            except EditError:  # damaged: nothing to go on from
                self.void()
                self.done, self.fits = 0, []
        self.finished = self.done == count

    def edit_file(self, edits: int) -> Path:
        """Name the file of the edit that stands for the first cases."""
        return self.folder / f"edit-{edits}.safetensors"

    def _edit_files(self) -> list[Path]:
        return sorted(self.folder.glob("edit-*.safetensors"))

    def void(self) -> None:
        """Take away all rows and edits: they are of a host that was no longer what it was."""
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
        """Keep a sequence's newest edit in place of the older ones, after the rows that it stands for."""
        self.guard()
        self.on_edit(edit)
        if not self.saves:
            return
        edit.save(self.edit_file(edits))
        for path in self._edit_files():
            if path != self.edit_file(edits):
                path.unlink()

    def end(self, document: dict[str, Any], *, keep_edits: bool) -> None:
        """Write what the cell comes to; the edit was only there to go on from, unless it is to be kept."""
        self.guard()
        edit_names = [path.name for path in self._edit_files()] if keep_edits else []
        document = {**document, FILES: hashes(self.folder, [ROWS, *edit_names])}
        document[FILES][ROWS]["lines"] = sum(1 for _ in self.journal)
        write_sealed(self.folder / summing.CELL, document)
        for path in self._edit_files():
            if not keep_edits:
                path.unlink()


def run(room: Room, cell: Cell, sheet: Sheet, tick: Tick) -> dict[str, Any]:
    """Fill a cell's folder with rows and return what is to be summed up beside them.

    Raises Refused where the method cannot do it, whatever else goes wrong as it is.
    """
    host = room.host(cell)
    health.reset_peak(host)
    try:
        check_probes(host, room.cases(cell), room.ask(cell))
        job = room.job(cell)
        if job is not None:
            check_schedule(job.method, cell.plan)
    except (ConfigError, RequestError) as error:
        raise Refused(str(error)) from error
    sheet.begin(host.fingerprint, room.cases(cell))
    for record in sheet.journal.records():
        sheet.on_record(record)
    edit = sheet.edit
    if not sheet.finished:
        _check_start(room, cell, sheet)
        edit = _fill(room, cell, sheet, tick, job)
    return summing.measured(host, edit, room.neutral(cell).prompts)


def _check_start(room: Room, cell: Cell, sheet: Sheet) -> None:
    """Set how many cases the edit to continue from is of. Raises DataError where the rows are of others."""
    edit = sheet.edit or sheet.after
    if edit is None:
        return
    count = count_edited_cases(edit, room.cases(cell), cell.plan, cell.seed)
    if sheet.edit is not None and count != sheet.done:
        raise DataError(f"the saved edit of {cell.id} is of {count} cases, its rows of {sheet.done}")
    sheet.edit, sheet.done = edit, count


def _fill(room: Room, cell: Cell, sheet: Sheet, tick: Tick, job: Job | None) -> Edit | None:
    """Fit and observe what is left; return the last edit."""
    neutral, lenient = room.neutral(cell), room.live is None
    engine = room.engine(cell, job, texts=neutral.texts, prompts=neutral.prompts, lenient=lenient, tick=tick)
    engine.fit_seconds = math.fsum(seconds for seconds in sheet.fits if seconds is not None)
    sequence = cell.plan.kind == "sequential"
    edit: Edit | None = None
    first = not sheet.done
    try:
        with closing(engine.events(cell.look or (), sheet.done, sheet.edit, sheet.fits or None)) as events:
            for event in events:
                edit, first = event.edit or edit, False
                if isinstance(event, Seen):
                    sheet.write(_case(event))
                    continue
                sheet.write(_look(room, cell, event, engine.fit_seconds))
                if sequence:
                    sheet.keep(event.edits, event.edit)
    except (ConfigError, HostError, RequestError) as error:
        if first:
            raise Refused(str(error)) from error
        raise
    if not lenient:
        return edit
    reasons = [line.record.get("refused") for line in sheet.journal if line.record["type"] == "case"]
    if all(reasons):  # nothing was edited, so there is nothing to compare
        sheet.void()
        raise Refused(f"none of {len(reasons)} cases can be edited; the first: {reasons[0]}")
    return edit


def _case(result: Seen) -> dict[str, Any]:
    """Return a case's line."""
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


def _look(room: Room, cell: Cell, look: Look, fit_seconds: float) -> dict[str, Any]:
    """Word the line of a look at several edits."""
    neutral, host = room.neutral(cell), room.host(cell)
    sizes = health.weights(look.edit, host, ratios=room.health)
    return {
        "type": "look",
        "edits": look.edits,
        "perplexity_before": neutral.perplexity,
        "perplexity_after": look.perplexity,
        "last_batch_efficacy": look.last_batch_efficacy,
        "fit_seconds": fit_seconds,
        **sizes,
        "digest": look.edit.digest,
        "bytes": look.edit.size,
        "collapse": health.condition(
            look.continued, neutral.continued, (neutral.perplexity, look.perplexity),
            list((sizes["norm_ratio"] or {}).values()),
        ) if room.health else None,
    }  # fmt: skip
