"""errata bench: run a recipe, models x methods x datasets x schedules x seeds, into a folder of results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.bench.plan import Plan
    from errata.bench.runs import Outcome


def command(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file; see docs/bench.md.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder; default: runs/ and the recipe's name.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder.")] = False,
    jobs: Annotated[
        int,
        typer.Option("--jobs", "-j", help="Number of parallel workers, each with its own copy of the model."),
    ] = 1,
    executor: Annotated[
        str, typer.Option(help="local: processes here; ray: tasks on a Ray cluster.")
    ] = "local",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Folder or name of a model to run in place of the recipe's only one."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Only cells whose name contains this text.")] = None,
    json: common.Json = False,
) -> None:
    """Run a benchmark recipe. Results are saved per case; --resume continues an interrupted run.

    Exits with code 1 if a cell failed.
    """
    from errata.bench import plan as plans
    from errata.bench import recipe as recipes
    from errata.bench import runs
    from errata.errors import ConfigError
    from errata.host.open import quiet

    if executor not in ("local", "ray"):
        raise ConfigError(f"executor {executor!r}: expected local or ray")
    read = recipes.read(recipe)
    plan = plans.make(read if model is None else recipes.on_model(read, model))
    cell_ids = plan.select_ids(only)
    folder = output or Path("runs") / recipe.stem
    if not json:
        _show_plan(plan, cell_ids, folder)
    if dry_run:
        if json:
            common.emit({**plan.document(), "chosen": cell_ids})
        return
    quiet()
    try:
        with common.progress(not json) as tick:
            outcome = runs.execute(
                plan, folder, resume=resume, jobs=jobs, executor="ray" if executor == "ray" else "local",
                only=only, tick=tick,
            )  # fmt: skip
    except KeyboardInterrupt:
        raise KeyboardInterrupt("completed cases are saved; continue with --resume") from None
    for cell, why in outcome.damaged.items():
        print(f"damaged and run again: {cell}: {why}", file=sys.stderr)
    if json:
        common.emit(_document(outcome))
    else:
        _show(outcome)
    if outcome.failed:
        raise typer.Exit(1)


def _document(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome of a run as JSON-ready data, without its rows."""
    return {
        "folder": str(outcome.folder),
        "cells": [
            {
                "id": job.cell,
                "status": job.state,
                "reason": job.reason,
                "summary": outcome.documents.get(job.cell, {}).get("summary"),
                "cost": outcome.documents.get(job.cell, {}).get("cost"),
            }
            for job in outcome.jobs
        ],
        "evaluation_seconds_per_case": _evaluation(outcome),
    }


def _show_plan(plan: Plan, cell_ids: list[str], folder: Path) -> None:
    """Print the cells that are to be run."""
    ids = set(cell_ids)
    rows = [
        [cell.model, cell.label, cell.dataset, cell.schedule, cell.seed, "yes" if cell.baseline else ""]
        for cell in plan.cells
        if cell.id in ids
    ]
    title = f"{plan.recipe.name}: {len(rows)} cells into {folder}"
    common.table(title, ("model", "method", "dataset", "schedule", "seed", "baseline"), rows, right=(4,))
    for name, facts in plan.datasets.items():
        print(f"{name}: {facts['cases']} cases, sha256 {facts['sha256'][:12]}")


def _show(outcome: Outcome) -> None:
    """Print the outcome of every cell and the evaluation time."""
    from errata.evaluation.metrics import headline_metric
    from errata.types import KINDS
    from errata.types.kinds import EFFICACY

    metric = headline_metric()
    preserved = [kind.name for kind in KINDS.values() if kind.headline and kind.group == "kept"]
    rows = []
    for job in outcome.jobs:
        document = outcome.documents.get(job.cell, {})
        if job.state != "done":
            rows.append([job.cell, job.state, "", "", "", _last_line(job.reason)])
            continue
        summary, cost = document["summary"], document["cost"]
        other = next((kind for kind in preserved if f"{kind}.{metric.name}" in summary), preserved[0])
        kinds = (EFFICACY, other)
        shares = [summary.get(f"{kind}.{metric.name}", {}).get("after") for kind in kinds]
        fit = cost["fit"]["median"]
        rows.append([
            job.cell, job.state, *("-" if share is None else f"{share:.3f}" for share in shares),
            "-" if fit is None else f"{fit:.2f}", f"{cost['observe']['per_case']:.3f}",
        ])  # fmt: skip
    columns = ("cell", "status", "efficacy", "kept", "fit, s", "evaluation, s per case; or the reason")
    common.table(metric.title, columns, rows, right=(2, 3, 4))
    seconds = _evaluation(outcome)
    words = [f"{value:.3f} s per {name} case" for name, value in seconds.items() if value is not None]
    if words:
        print(f"evaluation: {', '.join(words)}")
    print(f"results in {outcome.folder}")


def _last_line(reason: str | None) -> str:
    lines = (reason or "").strip().splitlines()
    return lines[-1][:200] if lines else ""


def _evaluation(outcome: Outcome) -> dict[str, float | None]:
    """Return the mean seconds of observing and scoring a case, with an edit and without one, averaged over cells."""
    costs: dict[str, list[float]] = {"edited": [], "unedited": []}
    for document in outcome.documents.values():
        if document["status"] == "done":
            name = "unedited" if document["cell"].get("rank") == 0 else "edited"
            costs[name].append(document["cost"]["observe"]["per_case"])
    return {name: sum(values) / len(values) if values else None for name, values in costs.items()}


VERB = Verb("bench", command, order=40)
