"""errata judge: have a language model judge the answers of a run, beside the matcher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli import common

if TYPE_CHECKING:
    from errata.evaluation.judge import JudgeSettings
    from errata.types import Row

JUDGED_ROWS = "judged.jsonl"
"""Rows of the judge, beside a cell's own."""

Url = Annotated[str, typer.Option("--url", help="The server, up to its version: http://localhost:8000/v1.")]
Name = Annotated[str, typer.Option("--judge", help="The judging model, as the server knows it.")]
Key = Annotated[str | None, typer.Option("--key-variable", help="Environment variable that holds the key.")]


def command(
    run: Annotated[Path, typer.Argument(help="A run folder of errata bench.")],
    url: Url,
    judge: Name,
    key: Key = None,
    only: Annotated[str | None, typer.Option(help="Only cells whose name holds this text.")] = None,
    parallel: Annotated[int, typer.Option(help="Calls under way at once.")] = 4,
    json: common.Json = False,
) -> None:
    """Judge a run's free answers with any OpenAI-compatible server; prints how far judge and matcher agree.

    Replies are kept in the run folder, so a command that was stopped goes on where it was. What the judge found
    is written beside each cell's rows, where reports show it under the judge's name.
    """
    from errata.bench.results import CELLS, JOBS, read_run
    from errata.errors import ConfigError
    from errata.evaluation.judge import JudgeSettings

    chosen = [cell["id"] for cell in read_run(run)["cells"] if only is None or only in cell["id"]]
    settings = JudgeSettings(url, judge, key, parallel=parallel, cache=(run / JOBS).with_name("judge.sqlite"))
    folders = [run / CELLS / name for name in chosen if (run / CELLS / name / "rows.jsonl").exists()]
    if not folders:
        raise ConfigError(f"{run} has no rows to judge" + (f" in cells named like {only!r}" if only else ""))
    found = {}
    with common.progress(not json) as tick:
        for folder in folders:
            found[folder.name] = _judge(folder, settings, tick)
    if json:
        common.emit(found)
    else:
        _show(found, judge)


def _judge(folder: Path, settings: JudgeSettings, tick: common.Tick) -> dict[str, Any]:
    """Judge the newest rows of a cell, write the judge's rows beside them, compare."""
    from errata.bench import results
    from errata.evaluation import judge, score

    rows = _newest(folder)
    made = judge.judge(rows, settings, on_progress=lambda done, total: tick(folder.name, done, total))
    journal = results.Journal(folder / JUDGED_ROWS)
    journal.cut(0)
    journal.append(*(asdict(row) for row in made))
    summary = score.summarise([*rows, *made])
    wanted = ("generate", "judge", "judge_undecided")
    shares = {name: entry for name, entry in summary.items() if name.rpartition(".")[2] in wanted}
    found = {"agreement": asdict(judge.agreement(made, rows)), "summary": shares}
    record = made[-1].detail["judge"] if made else settings.record
    files = results.hashes(folder, [JUDGED_ROWS])
    results.write_sealed(folder / results.JUDGED, {"judge": record, **found, results.FILES: files})
    return found


def _newest(folder: Path) -> list[Row]:
    """Return the free answers of a cell; of a sequence, those of its last look."""
    from errata.bench.results import ROWS, Journal, row_of

    lines = [line for line in Journal(folder / ROWS).records() if line["type"] == "case"]
    last = lines[-1]["edits"] if lines else None
    rows = [row_of(row) for line in lines if line["edits"] == last for row in line["rows"]]
    return [row for row in rows if row.protocol == "generate" and "text_after" in row.detail]


def _show(found: dict[str, dict[str, Any]], judge: str) -> None:
    rows: list[Sequence[Any]] = []
    for cell, entry in found.items():
        summary, together = entry["summary"], entry["agreement"]
        for kind in sorted({name.rpartition(".")[0] for name in summary}):
            matched, judged = (summary.get(f"{kind}.{p}", {}).get("after") for p in ("generate", "judge"))
            undecided = summary.get(f"{kind}.judge_undecided", {}).get("after")
            rows.append([cell, kind, *(_share(v) for v in (matched, judged, undecided))])
        rows.append(
            [cell, "agreement", _share(together["agree"]), _share(together["kappa"]), together["undecided"]]
        )
    columns = ("cell", "probe", "matcher (agreement)", f"{judge} (kappa)", "undecided")
    common.table("free answers, after the edit", columns, rows, right=(2, 3, 4))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
