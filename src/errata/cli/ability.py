"""errata ability: measure a model's general ability, without and with an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from errata.cli import common
from errata.cli._verb import Verb

Tasks = Annotated[
    list[str],
    typer.Argument(help="Tasks of lm-evaluation-harness, .yaml or .jsonl files of own tasks, .txt for perplexity."),
]  # fmt: skip


def command(
    tasks: Tasks,
    model: common.Model = "lab",
    edit: Annotated[
        list[Path] | None,
        typer.Option("--edit", "-e", help="Measure again with this edit; repeatable: applied together."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use the first N documents of each task; default: all.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Number of few-shot examples; default: the task's.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Format prompts with the tokenizer's chat template.")
    ] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    seed: common.Seed = 0,
    json: common.Json = False,
) -> None:
    """Measure general ability before and after an edit: lm-evaluation-harness tasks, own tasks, perplexity."""
    from errata.edits import Edit
    from errata.evaluation.ability import ability

    edits = [Edit.load(path) for path in edit or []]
    host = common.open_text_host(model, device, dtype)
    with common.progress(not json) as tick:
        results = ability(
            host, tasks, edit=edits, limit=limit, seed=seed, shots=shots, chat=chat, on_progress=tick
        )
    if json:
        common.emit(results)
    else:
        _show(results, host.name)


def _show(results: dict[str, dict[str, dict[str, Any]]], name: str) -> None:
    rows = [
        [
            task,
            metric,
            e["n"],
            *(_number(e[key]) for key in ("before", "after", "stderr", "stderr_difference")),
        ]
        for task, metrics in results.items()
        for metric, e in metrics.items()
    ]
    columns = ("task", "metric", "n", "before", "after", "standard error", "of the difference")
    common.table(f"general ability of {name}", columns, rows, right=range(2, len(columns)))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


VERB = Verb("ability", command, order=70)
