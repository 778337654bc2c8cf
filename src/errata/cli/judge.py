"""errata judge: have a language model judge the answers of a run, in addition to string matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.bench.judging import JudgedCell

Url = Annotated[str, typer.Option("--url", help="Base URL of the server: http://localhost:8000/v1.")]
Name = Annotated[str, typer.Option("--judge", help="Name of the judging model on the server.")]
Key = Annotated[str | None, typer.Option("--key-variable", help="Environment variable that holds the key.")]


def command(
    run: Annotated[Path, typer.Argument(help="A run folder of errata bench.")],
    url: Url,
    judge: Name,
    key: Key = None,
    only: Annotated[str | None, typer.Option(help="Only cells whose name contains this text.")] = None,
    parallel: Annotated[int, typer.Option(help="Number of concurrent calls.")] = 4,
    json: common.Json = False,
) -> None:
    """Judge a run's generated answers with any OpenAI-compatible server; print the agreement with string matching.

    Replies are cached in the run folder, so an interrupted command can be continued. The judge's verdicts are saved
    with each cell's rows; reports show them under the judge's name.
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
    """Print the shares that matcher and judge call right, by cell and kind of probe, and their agreement."""
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
    common.table("generated answers after the edit: share right", columns, rows, right=(2, 3, 4))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


VERB = Verb("judge", command, order=60)
