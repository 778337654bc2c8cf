"""A whole run: creates or resumes its folder, runs its cells, and returns how they ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from errata.bench import plan as plans
from errata.bench import results, workers
from errata.bench.jobs import OVER, Job, Jobs
from errata.bench.plan import Plan
from errata.bench.results import is_sealed, read_document, read_run, read_sealed, write_sealed
from errata.bench.runner import Tick
from errata.errors import ConfigError, DataError

Executor = Literal["local", "ray"]


@dataclass(frozen=True)
class Outcome:
    """How the chosen cells of a run ended."""

    folder: Path
    jobs: Sequence[Job]
    documents: Mapping[str, Mapping[str, Any]]
    """By cell, its ``cell.json``, as far as there is one."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Cells that were made anew because what was there was damaged, with what was wrong."""

    @property
    def failed(self) -> list[Job]:
        """Cells that went wrong; refused ones are none of them."""
        return [job for job in self.jobs if job.state == "failed"]


def execute(
    plan: Plan, folder: Path, *, resume: bool = False, jobs: int = 1,
    executor: Executor = "local", only: str | None = None, tick: Tick = lambda *_: None,
) -> Outcome:  # fmt: skip
    """Work a plan's cells off into a folder and return how they ended.

    ``resume``: go on with the run in the folder, failed, refused and damaged cells anew; else the folder must be new or
    empty. ``jobs``: workers at once, each with a model of its own; the rows do not depend on it. ``executor``:
    processes of this machine, or Ray. ``only``: cells whose id holds this text. Raises ConfigError or DataError
    where the folder and the plan do not belong together.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: expected a number from 1, found {jobs}")
    cell_ids = plan.select_ids(only)
    begin(plan, folder, resume=resume, shared=executor == "ray")
    table = Jobs(folder / results.JOBS)
    damaged: dict[str, str] = {}
    if resume:
        damaged = discard_damaged(folder, table, cell_ids)
        table.release_dead()
        table.forget_attempts()
        table.reopen(("failed", "refused"), cell_ids)
    if executor == "ray":
        workers.work_on_ray(folder, cell_ids, jobs, tick)
    elif jobs > 1:
        workers.work_in_processes(folder, cell_ids, jobs, tick)
    else:
        workers.work(folder, cell_ids, tick=tick)
    return replace(outcome(folder, cell_ids), damaged=damaged)


def discard_damaged(folder: Path, table: Jobs, cell_ids: Sequence[str]) -> dict[str, str]:
    """Take away what finished cells have that is not what was written, and open them again; return what was wrong."""
    sealed, damaged = is_sealed(folder), {}
    for job in table.all():
        if job.cell not in cell_ids or job.state not in OVER:
            continue
        cell_folder = folder / results.CELLS / job.cell
        if not (cell_folder / results.CELL).is_file():
            if job.state == "done":
                damaged[job.cell] = f"{results.CELL} is gone"
            continue
        try:
            document = read_sealed(cell_folder, sealed=sealed)
            rows = job.state == "done" and not (cell_folder / results.ROWS).is_file()
            if rows or document.get("status") != job.state:
                damaged[job.cell] = (
                    "its rows are gone" if rows else "table and cell do not agree how it ended"
                )
        except DataError as error:
            damaged[job.cell] = str(error)
    for cell in damaged:
        for path in (folder / results.CELLS / cell).glob("*"):
            if path.is_file():
                path.unlink()
    table.reopen(OVER, list(damaged))
    return damaged


def begin(plan: Plan, folder: Path, *, resume: bool, shared: bool = False) -> None:
    """Make a run folder, or check that the one there is of the same plan. Raises DataError or ConfigError."""
    if resume:
        wrong = plans.changes(read_run(folder), plan)
        if wrong:
            raise ConfigError("\n".join([f"{folder} is a run of something else; start a new one:", *wrong]))
    else:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(
                f"{folder} already exists and is not empty; continue with --resume, or name another"
            )
        try:
            (folder / results.CELLS).mkdir(parents=True)
        except OSError as error:
            raise DataError(f"cannot make {folder}: {error.strerror or error}") from error
        write_sealed(folder / results.RUN, plan.document())
    Jobs(folder / results.JOBS, shared=shared).create([cell.id for cell in plan.cells])


def outcome(folder: Path, cell_ids: Sequence[str]) -> Outcome:
    """Read how some cells of a run ended."""
    ids = set(cell_ids)
    jobs = [job for job in Jobs(folder / results.JOBS).all() if job.cell in ids]
    documents = {
        job.cell: read_document(path)
        for job in jobs
        if (path := folder / results.CELLS / job.cell / results.CELL).exists()
    }
    return Outcome(folder, jobs, documents)
