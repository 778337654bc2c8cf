"""A whole run: create or resume its folder, run its cells, and return their outcome."""

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
from errata.errors import ConfigError, DataError
from errata.progress import OnProgress, ignore

Executor = Literal["local", "ray"]


@dataclass(frozen=True)
class Outcome:
    """Outcome of the chosen cells of a run."""

    folder: Path
    jobs: Sequence[Job]
    documents: Mapping[str, Mapping[str, Any]]
    """By cell, its ``cell.json`` if it has one."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Cells that were run again because their files were damaged, with the reason."""

    @property
    def failed(self) -> list[Job]:
        """Failed cells; refused ones are not included."""
        return [job for job in self.jobs if job.state == "failed"]


def execute(
    plan: Plan, folder: Path, *, resume: bool = False, jobs: int = 1,
    executor: Executor = "local", only: str | None = None, tick: OnProgress = ignore,
) -> Outcome:  # fmt: skip
    """Run a plan's cells into a folder and return their outcome.

    ``resume``: continue the run in the folder, with failed, refused and damaged cells run again; otherwise the folder
    must be new or empty. ``jobs``: number of parallel workers, each with its own model; the rows do not depend on it.
    ``executor``: processes of this machine, or Ray. ``only``: cells whose id contains this text. Raises ConfigError or
    DataError if the folder is not a run of this plan.
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
    """Delete the files of finished cells that are damaged, and reopen those cells; return the reasons by cell."""
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
                    "its rows are gone" if rows else "the job table and its result file have different states"
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
    """Create a run folder, or check that an existing one has the same plan. Raises DataError or ConfigError."""
    if resume:
        wrong = plans.changes(read_run(folder), plan)
        if wrong:
            raise ConfigError("\n".join([f"{folder} is a run of another plan; start a new one:", *wrong]))
    else:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DataError(
                f"{folder} already exists and is not empty; continue with --resume, or name another"
            )
        try:
            (folder / results.CELLS).mkdir(parents=True)
        except OSError as error:
            raise DataError(f"cannot create {folder}: {error.strerror or error}") from error
        write_sealed(folder / results.RUN, plan.document())
    Jobs(folder / results.JOBS, shared=shared).create([cell.id for cell in plan.cells])


def outcome(folder: Path, cell_ids: Sequence[str]) -> Outcome:
    """Read the outcome of some cells of a run."""
    ids = set(cell_ids)
    jobs = [job for job in Jobs(folder / results.JOBS).all() if job.cell in ids]
    documents = {
        job.cell: read_document(path)
        for job in jobs
        if (path := folder / results.CELLS / job.cell / results.CELL).exists()
    }
    return Outcome(folder, jobs, documents)
