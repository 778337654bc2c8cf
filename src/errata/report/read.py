"""Read run folders: what was run, what each cell found, and its rows when they are asked for.

The folder's form is written down in docs/bench.md. A folder is read as it lies: a run that still goes on, or was
stopped, shows what it has so far.
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
"""The form of run folders that is understood."""
DAMAGED = "damaged"
"""State of a cell whose files are not what was written."""
STATES = ("done", "refused", "failed", DAMAGED)
"""States of a cell that is not going to change."""


@dataclass(frozen=True)
class Answer:
    """One probe's answers before and after, with every protocol's score of them."""

    kind: str
    prompt: str
    answers: tuple[str, ...]
    changes: bool
    """Whether the edit is meant to change the answer."""
    text_before: str | None
    """Greedy text; None where generation was not asked."""
    text_after: str | None
    scores: Mapping[str, tuple[float | None, float | None]]
    """By protocol, the score before and after."""


@dataclass(frozen=True)
class Asked:
    """The answers of one case at one moment."""

    case: str
    edits: int | None
    """How many edits were in place, of a sequence; None: the case's own alone."""
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Cell:
    """One method on one dataset, schedule and seed, as its run folder has it."""

    id: str
    folder: Path
    plan: Mapping[str, Any]
    """The cell's entry in ``run.json``: model, method, label, settings, dataset, schedule, look, seed, baseline."""
    status: str
    """done, refused, failed, damaged, or unfinished."""
    reason: str
    """Why it was refused or failed, maybe with a traceback; empty otherwise."""
    found: Mapping[str, Any] = field(default_factory=dict)
    """``cell.json``: tag, summary, looks, scores, retention, cost, host; empty before the cell's end."""

    judged: Mapping[str, Any] = field(default_factory=dict)
    """What a judge found, as ``errata judge`` wrote it: judge, agreement, summary; empty without."""

    @property
    def name(self) -> str:
        """What the method is called in tables."""
        return str(self.plan.get("label") or self.plan.get("method") or self.id)

    @property
    def method(self) -> str:
        """The registered method's name, or that of the baseline."""
        return str(self.plan.get("method") or self.name)

    @property
    def baseline(self) -> bool:
        """Whether it is one of the rows that always stand on a board."""
        return bool(self.plan.get("baseline"))

    @property
    def tag(self) -> Mapping[str, Any]:
        """The protocol: what must agree for two cells to share a table."""
        return self.found.get("tag") or {}

    @property
    def summary(self) -> Mapping[str, Mapping[str, Any]]:
        """Averages by ``"<kind>.<protocol>"``; of a sequence, at its end."""
        return self.found.get("summary") or {}

    @property
    def looks(self) -> Sequence[Mapping[str, Any]]:
        """Looks at a host with several edits in place, in order: of a sequence, or of every batch."""
        return self.found.get("looks") or ()

    @property
    def sequence(self) -> bool:
        """Whether its edits stay in place, one after the other."""
        return str(self.plan.get("schedule", "")).startswith("sequential")

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of cases as they stand in the file, in the order they were made.

        A torn last line is left out. Raises DataError for any other line that is no JSON object.
        """
        path = self.folder / ROWS
        for record in Journal(path).records():
            if record.get("type") == "case":
                shapes.check(record, shapes.LINE, f"a line of {path}")
                yield record

    def asked(self) -> Iterator[Asked]:
        """Yield every case's answers; of a sequence, those with all edits in place."""
        last = max((look["edits"] for look in self.looks), default=None) if self.sequence else None
        for record in self.records():
            if last is None or record.get("edits") == last:
                answers = _answers(record.get("rows") or ())
                yield Asked(str(record.get("case")), record.get("edits"), answers)

    @cached_property
    def cases(self) -> int:
        """How many different cases have rows."""
        return len({record.get("case") for record in self.records()})


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    document: Mapping[str, Any]
    """``run.json``."""
    cells: tuple[Cell, ...]
    verified: bool = True
    """Whether it was written with hashes; False: an older one, read as it lies."""

    @property
    def damaged(self) -> list[Cell]:
        """Cells whose files are not what was written."""
        return [cell for cell in self.cells if cell.status == DAMAGED]

    @property
    def name(self) -> str:
        """The recipe's name, else the folder's."""
        return str(self.document.get("name") or self.folder.name)


def read_runs(folders: Sequence[str | Path], *, skip_damaged: bool = False) -> list[Run]:
    """Read run folders. Raises DataError naming every folder that is none, all at once.

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
    """Read one run folder. Raises DataError where it is none, is of a form that is not understood, or is damaged.

    ``skip_damaged``: cells whose files are damaged are not refused but get that state, and nothing that they say is
    taken. A folder that was written before results carried hashes is read without being verified.
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
            + "\nmake damaged cells anew with: errata bench RECIPE -o RUN --resume; or report without them: "
            "--skip-damaged"
        )
    return run


def number(value: Any) -> float | None:
    """Read a number as results write it: the texts ``inf``, ``-inf`` and ``nan`` stand for themselves."""
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
        found, judged = _documents(folder, name, sealed)
        state, reason = states.get(name, ("", ""))
        if sealed and state == "done" and not found:
            raise DataError(f"{results.CELL} is gone")
    except DataError as error:
        return Cell(name, folder, plan, DAMAGED, str(error))
    status = str(found.get("status") or state)
    return Cell(
        id=name,
        folder=folder,
        plan=plan,
        status=status if status in STATES else "unfinished",
        reason=str(found.get("reason") or reason or ""),
        found=found,
        judged=judged,
    )


def _documents(folder: Path, name: str, sealed: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what a cell came to, and what a judge found. Raises DataError where either is damaged."""
    found: dict[str, Any] = {}
    judged: dict[str, Any] = {}
    if (folder / results.CELL).is_file():
        found = results.read_sealed(folder, results.CELL, sealed=sealed)
        shapes.check(found, shapes.CELL, folder / results.CELL)
        if sealed and found.get("id") != name:
            raise DataError(f"{folder / results.CELL} is that of cell {shown(found.get('id'))}")
    if (folder / results.JUDGED).is_file():
        judged = results.read_sealed(folder, results.JUDGED, sealed=sealed)
        shapes.check(judged, shapes.JUDGED, folder / results.JUDGED)
    return found, judged


def _states(path: Path, cells: Sequence[str], sealed: bool) -> dict[str, tuple[str, str]]:
    """Read state and reason of some cells from the job table; nothing where there is none.

    Raises DataError for a table that cannot be read, and, of a run with seals, one that does not say what was
    written there.
    """
    if not path.is_file():
        return {}
    states = {}
    for cell, state, reason, seal in _jobs(path):
        if seal and seal != results.job_seal(cell, state, reason):
            raise DataError(f"{path} is damaged: cell {shown(cell)} did not end as it says")
        states[str(cell)] = (str(state), str(reason or ""))
    wrong = [cell for cell in cells if states.get(cell, ("", ""))[0] not in results.JOB_STATES]
    if sealed and wrong:
        raise DataError(f"{path} is damaged: it does not say how cell {shown(wrong[0])} stands")
    return states


def _jobs(path: Path) -> list[tuple[Any, Any, Any, Any]]:
    """Read the lines of a job table: cell, state, reason, and their seal where there is one."""
    # a table with a write-ahead log in a folder that nobody may write to opens only as one that never changes
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
    """Put the rows of one probe together: same kind and prompt, each protocol once."""
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
