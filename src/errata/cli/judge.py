"""errata judge: have a language model judge the answers of a run, beside the matcher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.bench.judging import JudgedCell

Url = Annotated[str, typer.Option("--url", help="The server, up to its version: http://localhost:8000/v1.")]
Name = Annotated[str, typer.Option("--judge", help="The judging model, as the server knows it.")]
Key = Annotated[str | None, typer.Option("--key-variable", help="Environment variable that holds the key.")]


def command(
    run: Annotated[Path, typer.Argument(help="A run folder of errata bench.")],
    url: Url,
    judge: Name,
    key: Key = None,
    only: Annotated[str | None, typer.Option(help="Only cells whose name contains this text.")] = None,
    parallel: Annotated[int, typer.Option(help="Calls under way at once.")] = 4,
    json: common.Json = False,
) -> None:
    """Judge a run's free answers with any OpenAI-compatible server; prints how far judge and matcher agree.

    Replies are cached in the run folder, so an interrupted command can be continued. The judge's verdicts
    are saved with each cell's rows, where reports show them under the judge's name.
    """
    from errata.bench.judging import judge_run
    from errata.evaluation.judge import JudgeSettings

    settings = JudgeSettings(url, judge, key, parallel=parallel)
    with common.progress(not json) as tick:
        cells = judge_run(run, settings, only=only, on_progress=tick)
    if json:
        common.emit({name: cell.to_dict() for name, cell in cells.items()})
    else:
        _show(cells, judge)


def _show(cells: Mapping[str, JudgedCell], judge: str) -> None:
    """Print what matcher and judge call right, by cell and kind of probe, and how far they agree."""
    from errata.evaluation.metrics import headline_metric
    from errata.evaluation.metrics.judged import JUDGE, UNDECIDED

    names = (headline_metric().name, JUDGE, UNDECIDED)
    rows: list[Sequence[Any]] = []
    for name, cell in cells.items():
        for kind in sorted({key.rpartition(".")[0] for key in cell.summary}):
            shares = (cell.summary.get(f"{kind}.{metric}", {}).get("after") for metric in names)
            rows.append([name, kind, *map(_share, shares)])
        agreement = cell.agreement
        rows.append(
            [name, "agreement", _share(agreement.agree), _share(agreement.kappa), agreement.undecided]
        )
    columns = ("cell", "probe", "matcher (agreement)", f"{judge} (kappa)", "undecided")
    common.table("free answers, after the edit", columns, rows, right=(2, 3, 4))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


VERB = Verb("judge", command, order=60)
