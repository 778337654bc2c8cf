"""The run folder of one evaluation, new or continued."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from errata import config as settings
from errata.bench import recipe, results, runs, sources
from errata.bench.jobs import Jobs, Lease, new_owner
from errata.bench.plan import Cell, Plan
from errata.bench.worker_state import Live
from errata.edits.edit import Edit
from errata.errors import ConfigError, DataError

SETTINGS = "evaluation.json"
"""Everything that determines the rows of an evaluation, in its run folder."""


def describe(live: Live, cell: Cell, after: Edit | None, *, own_examples: bool) -> dict[str, Any]:
    """Return everything that determines the rows of an evaluation, as JSON-ready data.

    ``own_examples``: whether the caller gave examples in place of the host's.
    """
    return {
        "model": live.host.fingerprint,
        "dtype": str(live.host.dtype),
        "cases": sources.digest(live.cases),
        "method": cell.method,
        "settings": settings.plain(live.job.config) if live.job else {},
        "edits": [edit.digest for edit in live.edit.edits] if live.edit else [],
        "after": None if after is None else after.digest,
        "schedule": cell.schedule,
        "checkpoints": cell.look,
        "seed": cell.seed,
        "asking": live.ask.to_dict(),
        "corpus": None if live.work.corpus is None else live.work.corpus.name,
        "examples": sources.digest(live.work.examples) if own_examples else None,
    }


def exists(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains an evaluation, finished or not."""
    return (Path(folder) / SETTINGS).is_file()


def create_or_resume(folder: Path, plan: Plan, evaluation: Mapping[str, Any]) -> None:
    """Create a run folder, or prepare an existing one of the same evaluation for continuation.

    ``evaluation``: from :func:`describe`. Raises ConfigError for a folder of another evaluation, DataError for one
    that is no evaluation or is damaged.
    """
    new = json.loads(json.dumps(evaluation, default=str))
    if not exists(folder):
        if folder.is_dir() and any(folder.iterdir()):
            raise DataError(
                f"{folder} is not empty and contains no evaluation to continue; name another folder"
            )
        runs.begin(plan, folder, resume=False)
        results.write_sealed(folder / SETTINGS, new)
        return
    old = results.read_document(folder / SETTINGS, sealed=True)
    differences = recipe.differences(old, new)
    if differences:
        raise ConfigError(
            "\n".join(
                [
                    f"{folder} contains another evaluation; name another folder, or repeat that one:",
                    *differences,
                ]
            )
        )
    ids = [cell.id for cell in plan.cells]
    table = Jobs(folder / results.JOBS)
    table.create(ids)
    runs.discard_damaged(folder, table, ids)
    table.release_dead()
    table.forget_attempts()


def finished_document(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """Return the ``cell.json`` of a finished evaluation; None while cases remain."""
    if {job.cell: job.state for job in Jobs(folder / results.JOBS).all()}[cell.id] != "done":
        return None
    return results.read_sealed(folder / results.CELLS / cell.id, sealed=True)


@contextmanager
def lease(folder: Path, cell: Cell) -> Generator[Lease, None, None]:
    """Lease the cell inside the block, and mark it done at its end; if the block raises, it can be resumed.

    Raises DataError if another process has the lease.
    """
    table, owner = Jobs(folder / results.JOBS), new_owner()
    if table.take(owner, [cell.id]) is None:
        raise DataError(f"another process is evaluating into {folder}; wait for it, or name another folder")
    try:
        with Lease(table, cell.id, owner) as cell_lease:
            yield cell_lease
            table.end(cell.id, owner, "done")
    except BaseException:
        table.release(cell.id, owner)
        raise
