"""errata report: look at run folders: tables here, a page, figures, a card."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common
from errata.cli._verb import Verb

if TYPE_CHECKING:
    from errata.report.read import Run
    from errata.report.tables import Table

Folders = Annotated[list[Path], typer.Argument(help="Run folders that errata bench wrote; put together.")]
Html = Annotated[Path | None, typer.Option("--html", help="Write one self-contained page here.")]
Figures = Annotated[
    Path | None,
    typer.Option("--figures", help="Write figures into this folder, PNG and SVG, light and dark."),
]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="Write a card with all tables here.")]
Cases = Annotated[
    int, typer.Option("--cases", min=0, help="Page: how many cases of each cell to hold with their texts.")
]


def command(
    runs: Folders,
    html: Html = None,
    figures: Figures = None,
    markdown: Markdown = None,
    cases: Cases = 100,
    skip_damaged: Annotated[
        bool,
        typer.Option("--skip-damaged", help="Report without damaged cells; they are named, exit code 1."),
    ] = False,
    json: common.Json = False,
) -> None:
    """Summarise runs: one leaderboard per protocol; optionally HTML, figures, Markdown."""
    from errata.report.read import read_runs

    results = read_runs(runs, skip_damaged=skip_damaged)
    paths = _write(results, html, figures, markdown, cases)
    if json:
        from errata.report.page import document

        common.emit({**document(results, cases=0), "written": [str(path) for path in paths]})
    else:
        _show(results)
        for path in paths:
            print(f"written: {path}")
    damaged = [cell for run in results for cell in run.damaged]
    for cell in damaged:
        print(common.safe(f"damaged: cell {cell.id}: {cell.reason}"), file=sys.stderr)
    if damaged:
        raise typer.Exit(1)


def _write(
    runs: list[Run], html: Path | None, figures: Path | None, markdown: Path | None, cases: int
) -> list[Path]:
    paths = []
    if html is not None:
        from errata.report.page import write_page

        paths.append(write_page(html, runs, cases=cases))
    if markdown is not None:
        from errata.report.card import card
        from errata.report.files import write

        paths.append(write(markdown, card(runs)))
    if figures is not None:
        from errata.report.figures import write_figures

        paths += write_figures(figures, runs)
    return paths


def _show(runs: list[Run]) -> None:
    from errata.report import tables
    from errata.report.board import boards
    from errata.report.published import comparisons

    leaderboards = boards(runs)
    for section in tables.sections(leaderboards, brief=True):
        print(common.safe(f"{section.title}\nprotocol: {section.tag}\n"))
        for table in section.tables:
            _print(table)
    if not leaderboards:
        print("no cell has results yet")
    for table in tables.published_tables(comparisons(runs, leaderboards), brief=True):
        _print(table)
    absent = tables.absent_table(runs)
    if absent is not None:
        _print(absent, right=False)
    for run in runs:
        if not run.verified:
            print(
                f"{common.safe(run.name)}: written before results carried hashes, so its files are not verified"
            )


def _print(table: Table, *, right: bool = True) -> None:
    if table.rows:
        rows: list[list[Any]] = [list(row) for row in table.rows]
        common.table(table.title, table.columns, rows, right=range(1, len(table.columns)) if right else ())
    else:
        print(common.safe(table.title))
    for note in table.notes:
        print(common.safe(f"  {note}"))
    if table.notes:
        print()


VERB = Verb("report", command, order=50)
