"""Workers: take cells from the job table until none is left, in this process, in several, or on a cluster."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from errata.bench import cells, plan, results, summing
from errata.bench.cells import CellFolder, Refused
from errata.bench.jobs import OVER, Jobs, Lease, LeaseLost, State, new_owner
from errata.bench.results import read_run
from errata.bench.worker_state import WorkerState
from errata.errors import ConfigError, DataError
from errata.progress import OnProgress, ignore

POLL = 0.2
"""Seconds between reads of the job table while other workers have all remaining cells."""
PATIENCE = 10.0
"""Seconds to wait for a worker to end before it is killed."""


def work(folder: Path, cell_ids: Sequence[str], *, tick: OnProgress = ignore) -> None:
    """Run cells until all of these are finished, including those whose worker died.

    A failed cell is marked as failed; the others are still run.
    """
    run_plan = plan.restore(read_run(folder))
    jobs, worker, owner = Jobs(folder / results.JOBS), WorkerState(folder, run_plan), new_owner()
    by_id = {cell.id: cell for cell in run_plan.cells}
    with threads(run_plan.recipe.threads):
        while True:
            cell_id = jobs.take(owner, cell_ids)
            if cell_id is not None:
                # after a lost lease, another worker continues the cell
                with suppress(LeaseLost), Lease(jobs, cell_id, owner) as lease:
                    cell_folder = CellFolder(folder / results.CELLS / cell_id, by_id[cell_id], lease.check)
                    jobs.end(cell_id, owner, *_attempt(worker, cell_folder, tick))
            remaining = [job for job in jobs.all() if job.cell in set(cell_ids) and job.state not in OVER]
            tick("cells", len(cell_ids) - len(remaining), len(cell_ids))
            if not remaining:
                return
            if cell_id is None:
                jobs.release_dead()
                time.sleep(POLL)


def _attempt(worker: WorkerState, cell_folder: CellFolder, tick: OnProgress) -> tuple[State, str | None]:
    """Run a cell; return its final state and the reason. Raises LeaseLost if another worker has taken it over."""
    cell, restored = cell_folder.cell, None
    state: State
    try:
        measured = cells.run(worker, cell, cell_folder, tick)
        restored = worker.restored()
        if not restored:
            raise DataError(f"{cell.method} did not restore the weights of {cell.model}; the rows are void")
        cell_folder.end(
            summing.document(worker, cell, cell_folder.journal, measured),
            keep_edits=worker.plan.recipe.keep_edits,
        )
    except LeaseLost:
        raise
    except Refused as refused:
        state, reason = "refused", str(refused)
    except Exception:  # whatever a method raises, the other cells must still run
        state, reason = "failed", traceback.format_exc()
    else:
        return "done", None
    restored = worker.restored() if restored is None else restored
    cell_folder.guard()
    if restored is False:
        cell_folder.void()
    cell_folder.folder.mkdir(parents=True, exist_ok=True)
    results.write_sealed(cell_folder.folder / results.CELL, summing.unfinished(cell, state, reason, restored))
    return state, reason


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Set the number of torch threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def work_in_processes(folder: Path, cell_ids: Sequence[str], count: int, tick: OnProgress) -> None:
    """Run cells in several processes. One that dies is replaced.

    Raises DataError for one that dies before it took a cell.
    """
    jobs, context = Jobs(folder / results.JOBS), multiprocessing.get_context("spawn")
    attempts_before = 0

    def start() -> BaseProcess:
        process = context.Process(target=_run_worker, args=(folder, cell_ids), daemon=True)
        with _interrupts_blocked():
            process.start()
        return process

    workers = [start() for _ in range(min(count, len(cell_ids)))]
    try:
        while workers:
            time.sleep(POLL)
            for process in [worker for worker in workers if not worker.is_alive()]:
                workers.remove(process)
                if process.exitcode:
                    attempts = sum(job.attempts for job in jobs.all())
                    if attempts <= attempts_before:
                        raise DataError(
                            f"a worker ended with exit code {process.exitcode} before it took a cell; "
                            "run with --jobs 1 to see why"
                        )
                    attempts_before = attempts
                    jobs.release_dead()
                    workers.append(start())
            over = [job for job in jobs.all() if job.cell in set(cell_ids) and job.state in OVER]
            tick("cells", len(over), len(cell_ids))
    finally:
        for process in workers:
            process.terminate()
        for process in workers:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()


def _run_worker(folder: Path, cell_ids: Sequence[str]) -> None:
    """Run cells in a child process; on SIGTERM it raises SystemExit, so that half-written files are removed."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    work(folder, cell_ids)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT inside the block, and permanently in processes started inside it.

    A terminal sends Ctrl-C to all of them: this process handles it and ends the others.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # it unblocks SIGINT when it starts, so it must start before the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work_on_ray(folder: Path, cell_ids: Sequence[str], count: int, tick: OnProgress) -> None:
    """Run cells as Ray tasks, here or on the cluster that ``RAY_ADDRESS`` names; all must share the folder.

    Raises ConfigError if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--executor ray needs Ray: pip install 'errata[ray]'") from error
    mine = not ray.is_initialized()
    if mine:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        task: Callable[..., Any] = ray.remote(num_cpus=1, max_retries=0)(work).remote
        waiting = [task(folder.resolve(), list(cell_ids)) for _ in range(min(count, len(cell_ids)))]
        jobs = Jobs(folder / results.JOBS)
        while waiting:
            finished, waiting = ray.wait(waiting, timeout=1.0)
            over = [job for job in jobs.all() if job.cell in set(cell_ids) and job.state in OVER]
            tick("cells", len(over), len(cell_ids))
            ray.get(finished)  # raises what a worker raised
    finally:
        if mine:
            ray.shutdown()
