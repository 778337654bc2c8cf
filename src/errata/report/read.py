"""Read run folders: the plan, each cell's results, and its rows on demand.

The format is documented in docs/bench.md. An unfinished run is read with the results it has so far.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from errata.bench import results
from errata.bench.results import ROWS, RUN, Journal
from errata.errors import DataError, listing, shown
from errata.report import shapes

SCHEMA = 1
"""The supported version of the run folder format."""
DAMAGED = "damaged"
"""State of a cell whose files do not match their hashes."""
STATES = ("done", "refused", "failed", DAMAGED)
"""Final states of a cell."""


@dataclass(frozen=True)
class Answer:
    """One probe's answers before and after, with the scores of every protocol."""

    kind: str
    prompt: str
    answers: tuple[str, ...]
    changes: bool
    """Whether the edit is meant to change the answer."""
    text_before: str | None
    """Generated text; None without generation."""
    text_after: str | None
    scores: Mapping[str, tuple[float | None, float | None]]
    """By protocol, the score before and after."""


@dataclass(frozen=True)
class CaseAnswers:
    """The answers to all probes of a case at one checkpoint."""

    case: str
    edits: int | None
    """Number of edits in place in a sequence; None: the case's own edit alone."""
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Cell:
    """One method on one dataset, schedule and seed, read from a run folder."""

    id: str
    folder: Path
    plan: Mapping[str, Any]
    """The cell's entry in ``run.json``: model, method, label, settings, dataset, schedule, look, seed, baseline."""
    status: str
    """done, refused, failed, damaged, or unfinished."""
    reason: str
    """Why it was refused or failed, possibly with a traceback; empty otherwise."""
    result: Mapping[str, Any] = field(default_factory=dict)
    """``cell.json``: tag, summary, looks, scores, retention, cost, host; empty until the cell is finished."""

    verdicts: Mapping[str, Any] = field(default_factory=dict)
    """A judge's results as written by ``errata judge``: judge, agreement, summary; empty without a judge."""

    @property
    def name(self) -> str:
        """The method's name in tables."""
        return str(self.plan.get("label") or self.plan.get("method") or self.id)

    @property
    def method(self) -> str:
        """The registered method's name, or that of the baseline."""
        return str(self.plan.get("method") or self.name)

    @property
    def baseline(self) -> bool:
        """Whether it is a baseline, which every board shows."""
        return bool(self.plan.get("baseline"))

    @property
    def tag(self) -> Mapping[str, Any]:
        """The protocol: settings that must agree for two cells to be in one table."""
        return self.result.get("tag") or {}

    @property
    def summary(self) -> Mapping[str, Mapping[str, Any]]:
        """Averages by ``"<kind>.<protocol>"``; for a sequence, at its end."""
        return self.result.get("summary") or {}

    @property
    def checkpoints(self) -> Sequence[Mapping[str, Any]]:
        """Measurements of a host with several edits in place, in order: of a sequence, or of every batch."""
        return self.result.get("looks") or ()

    @property
    def sequence(self) -> bool:
        """Whether its edits stay in place, one after the other."""
        return str(self.plan.get("schedule", "")).startswith("sequential")

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of cases from the file, in order.

        An incomplete last line is ignored. Raises DataError for any other line that is not a JSON object.
        """
        path = self.folder / ROWS
        for record in Journal(path).records():
            if record.get("type") == "case":
                shapes.check(record, shapes.LINE, f"a line of {path}")
                yield record

    def case_answers(self) -> Iterator[CaseAnswers]:
        """Yield every case's answers; for a sequence, those with all edits in place."""
        last = max((look["edits"] for look in self.checkpoints), default=None) if self.sequence else None
        for record in self.records():
            if last is None or record.get("edits") == last:
                answers = _answers(record.get("rows") or ())
                yield CaseAnswers(str(record.get("case")), record.get("edits"), answers)

    @cached_property
    def cases(self) -> int:
        """The number of distinct cases with rows."""
        return len({record.get("case") for record in self.records()})


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    document: Mapping[str, Any]
    """``run.json``."""
    cells: tuple[Cell, ...]
    verified: bool = True
    """Whether its files have hashes; False: an older run, read without verification."""

    @property
    def damaged(self) -> list[Cell]:
        """Cells whose files do not match their hashes."""
        return [cell for cell in self.cells if cell.status == DAMAGED]

    @property
    def name(self) -> str:
        """The recipe's name, else the folder's."""
        return str(self.document.get("name") or self.folder.name)


def read_runs(folders: Sequence[str | Path], *, skip_damaged: bool = False) -> list[Run]:
    """Read run folders. Raises DataError listing every folder that cannot be read, all at once.

    ``skip_damaged``: as for :func:`read_run`.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder, skip_damaged=skip_damaged))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("; ".join(problems))
    return runs


def read_run(folder: str | Path, *, skip_damaged: bool = False) -> Run:
    """Read one run folder. Raises DataError where it is not one, has an unsupported format, or is damaged.

    ``skip_damaged``: damaged cells are not an error; they get that state and their content is ignored. A folder of
    an older version, without hashes, is read without verification.
    """
    place = Path(folder)
    document = results.read_run(place)
    if document.get("schema") != SCHEMA:
        raise DataError(
            f"{place}: {RUN} has schema {shown(document.get('schema'))}, expected {SCHEMA}; "
            "use the version of errata that wrote it"
        )
    shapes.check(document, shapes.RUN, place / RUN)
    sealed = results.is_sealed(place)
    plans = [dict(plan) for plan in document.get("cells") or ()]
    for plan in plans:
        shapes.check(plan, shapes.PLAN, f"a cell of {place / RUN}")
    unfinished = [plan for plan in plans if not (place / results.CELLS / plan["id"] / results.CELL).is_file()]
    states = _states(place / results.JOBS, [plan["id"] for plan in unfinished], sealed) if unfinished else {}
    run = Run(place, document, tuple(_cell(place, plan, states, sealed) for plan in plans), sealed)
    if run.damaged and not skip_damaged:
        raise DataError(
            listing([f"cell {cell.id} of {place} is damaged: {cell.reason}" for cell in run.damaged], 20)
            + "\nrun damaged cells again with: errata bench RECIPE -o RUN --resume; or report without them: "
            "--skip-damaged"
        )
    return run


def number(value: Any) -> float | None:
    """Read a number of a result file, which may be the text ``inf``, ``-inf`` or ``nan``."""
    try:
        if isinstance(value, (int, float)) or value in ("inf", "-inf", "nan"):
            return float(value)
    except OverflowError as error:
        raise DataError(f"expected a number of results, found {shown(value)}") from error
    return None


def _cell(place: Path, plan: dict[str, Any], states: Mapping[str, tuple[str, str]], sealed: bool) -> Cell:
    name = plan["id"]
    folder = place / results.CELLS / name
    try:
        result, verdicts = _documents(folder, name, sealed)
        state, reason = states.get(name, ("", ""))
        if sealed and state == "done" and not result:
            raise DataError(f"{results.CELL} is gone")
    except DataError as error:
        return Cell(name, folder, plan, DAMAGED, str(error))
    status = str(result.get("status") or state)
    return Cell(
        id=name,
        folder=folder,
        plan=plan,
        status=status if status in STATES else "unfinished",
        reason=str(result.get("reason") or reason or ""),
        result=result,
        verdicts=verdicts,
    )


def _documents(folder: Path, name: str, sealed: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a cell's results and a judge's results. Raises DataError where either is damaged."""
    result: dict[str, Any] = {}
    verdicts: dict[str, Any] = {}
    if (folder / results.CELL).is_file():
        result = results.read_sealed(folder, results.CELL, sealed=sealed)
        shapes.check(result, shapes.CELL, folder / results.CELL)
        if sealed and result.get("id") != name:
            raise DataError(f"{folder / results.CELL} belongs to cell {shown(result.get('id'))}")
    if (folder / results.JUDGED).is_file():
        verdicts = results.read_sealed(folder, results.JUDGED, sealed=sealed)
        shapes.check(verdicts, shapes.JUDGED, folder / results.JUDGED)
    return result, verdicts


def _states(path: Path, cells: Sequence[str], sealed: bool) -> dict[str, tuple[str, str]]:
    """Read state and reason of some cells from the job table; empty where there is none.

    Raises DataError for a table that cannot be read or, for a run with hashes, does not match them.
    """
    if not path.is_file():
        return {}
    states = {}
    for cell, state, reason, seal in _jobs(path):
        if seal and seal != results.job_seal(cell, state, reason):
            raise DataError(f"{path} is damaged: the state of cell {shown(cell)} does not match its hash")
        states[str(cell)] = (str(state), str(reason or ""))
    wrong = [cell for cell in cells if states.get(cell, ("", ""))[0] not in results.JOB_STATES]
    if sealed and wrong:
        raise DataError(f"{path} is damaged: it has no valid state of cell {shown(wrong[0])}")
    return states


def _jobs(path: Path) -> list[tuple[Any, Any, Any, Any]]:
    """Read the rows of a job table: cell, state, reason, and their hash where there is one."""
    # a database with a write-ahead log in a read-only folder opens only in immutable mode
    for mode in ("mode=ro", "immutable=1"):
        try:
            with closing(sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True)) as base:
                names = [line[1] for line in base.execute("PRAGMA table_info(jobs)")]
                seal = "seal" if "seal" in names else "NULL"
                return base.execute(f"SELECT cell, state, reason, {seal} FROM jobs").fetchall()
        except (sqlite3.Error, UnicodeDecodeError, OverflowError) as error:
            if mode == "mode=ro" and any(words in str(error) for words in ("readonly", "unable to open")):
                continue
            raise DataError(f"cannot read the job table {path}: {error}") from error
    return []


def _answers(rows: Sequence[Mapping[str, Any]]) -> tuple[Answer, ...]:
    """Group rows into probes: same kind and prompt, each protocol once."""
    groups: dict[tuple[str, str], list[dict[str, Mapping[str, Any]]]] = {}
    order: list[dict[str, Mapping[str, Any]]] = []
    for row in rows:
        same = groups.setdefault((str(row["kind"]), str(row["prompt"])), [])
        protocol = str(row["protocol"])
        probe = next((one for one in same if protocol not in one), None)
        if probe is None:
            probe = {}
            same.append(probe)
            order.append(probe)
        probe[protocol] = row
    return tuple(_answer(probe) for probe in order)


def _answer(protocols: Mapping[str, Mapping[str, Any]]) -> Answer:
    first = next(iter(protocols.values()))
    detail: dict[str, Any] = {}
    for row in protocols.values():
        for name, value in (row.get("detail") or {}).items():
            detail.setdefault(name, value)
    return Answer(
        kind=str(first["kind"]),
        prompt=str(first["prompt"]),
        answers=tuple(map(str, detail.get("answers") or ())),
        changes=bool(detail.get("changes", True)),
        text_before=detail.get("text_before"),
        text_after=detail.get("text_after"),
        scores={name: (number(row["before"]), number(row["after"])) for name, row in protocols.items()},
    )
