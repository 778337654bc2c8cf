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
from errata.bench.runner import Tick
from errata.bench.worker_state import WorkerState
from errata.errors import ConfigError, DataError

POLL = 0.2
"""Seconds between looks at the job table while others hold all that is left."""
PATIENCE = 10.0
"""Seconds that a worker has to end when it is told to."""


def work(folder: Path, cell_ids: Sequence[str], *, tick: Tick = lambda *_: None) -> None:
    """Run cells until all of these are finished, including any that other workers lose.

    A cell that fails is marked so and does not end the work.
    """
    run_plan = plan.restore(read_run(folder))
    jobs, worker, owner = Jobs(folder / results.JOBS), WorkerState(folder, run_plan), new_owner()
    by_id = {cell.id: cell for cell in run_plan.cells}
    with threads(run_plan.recipe.threads):
        while True:
            cell_id = jobs.take(owner, cell_ids)
            if cell_id is not None:
                # where the lease is lost, another worker continues the cell: nothing to do here
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


def _attempt(worker: WorkerState, cell_folder: CellFolder, tick: Tick) -> tuple[State, str | None]:
    """Run a cell; return its final state and the reason. Raises LeaseLost if another worker has taken it over."""
    cell, restored = cell_folder.cell, None
    state: State
    try:
        measured = cells.run(worker, cell, cell_folder, tick)
        restored = worker.restored()
        if not restored:
            raise DataError(
                f"{cell.method} left weights of {cell.model} other than they were; the rows are void"
            )
        cell_folder.end(
            summing.document(worker, cell, cell_folder.journal, measured),
            keep_edits=worker.plan.recipe.keep_edits,
        )
    except LeaseLost:
        raise
    except Refused as refused:
        state, reason = "refused", str(refused)
    except Exception:  # whatever a method does: the others are not to lose their turn
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
    """Compute with so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def work_in_processes(folder: Path, cell_ids: Sequence[str], count: int, tick: Tick) -> None:
    """Work with several processes. One that dies is replaced, unless it died before it took a cell.

    Raises DataError for that.
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
    """Work in a process of its own, which its parent ends: what is half-written is then taken away again."""

    def end(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    warnings.formatwarning = lambda message, *_: f"warning: {' '.join(str(message).split())}\n"
    work(folder, cell_ids)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Hold Ctrl-C back inside the block, and for good in processes started there.

    A terminal sends it to them all: this process answers it, and ends the others.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # which lets Ctrl-C through when it starts, as it would inside the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work_on_ray(folder: Path, cell_ids: Sequence[str], count: int, tick: Tick) -> None:
    """Work with Ray tasks, here or on the cluster that ``RAY_ADDRESS`` names; all must see the folder.

    Raises ConfigError where Ray is not installed.
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
