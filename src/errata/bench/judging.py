"""Judge a run: a language model rates the generated answers of its cells; its rows are stored with theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from errata.bench import results
from errata.bench.plan import is_named
from errata.errors import ConfigError
from errata.evaluation import judge, score
from errata.evaluation.judge import Agreement, JudgeSettings
from errata.evaluation.metrics import headline_metric, metric_of
from errata.progress import OnCount, OnProgress, ignore
from errata.types import Row

ROWS = "judged.jsonl"
"""File with the judge's rows, in a cell's folder."""
REPLIES = "judge.sqlite"
"""The judge's replies, in the run folder."""


@dataclass(frozen=True)
class JudgedCell:
    """A judge's verdicts on the answers of one cell."""

    agreement: Agreement
    """How far judge and matcher agree on the answers after the edit."""
    summary: Mapping[str, Mapping[str, Any]]
    """Averages of the matcher's rows and of the judge's, by ``"<kind>.<metric>"``."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data, as ``judged.json`` holds it."""
        return {"agreement": asdict(self.agreement), "summary": self.summary}


def judge_run(
    folder: str | Path, settings: JudgeSettings, *, only: str | None = None,
    on_progress: OnProgress = ignore,
) -> dict[str, JudgedCell]:  # fmt: skip
    """Judge the generated answers of a run with a language model, and write its verdicts into the run folder.

    For a sequence, the answers at its last checkpoint are judged. Replies are cached in the run folder, so that an
    interrupted call can be continued; ``settings.cache`` names another file. ``only``: judge only cells whose name
    contains this text. Returns the verdicts by cell.

    Raises ConfigError if there is nothing to judge or the settings are invalid, DataError for a folder that is no run
    or is damaged, and if the judge cannot be reached.
    """
    place = Path(folder)
    names = [cell["id"] for cell in results.read_run(place)["cells"] if is_named(cell["id"], only)]
    folders = [place / results.CELLS / name for name in names]
    folders = [cell for cell in folders if (cell / results.ROWS).exists()]
    if not folders:
        where = f" in cells named like {only!r}" if only else ""
        raise ConfigError(f"{place} has no rows to judge{where}")
    if settings.cache is None:
        settings = replace(settings, cache=place / REPLIES)
    return {
        cell.name: _judge_cell(
            cell, settings, lambda completed, total, name=cell.name: on_progress(name, completed, total)
        )
        for cell in folders
    }


def _judge_cell(folder: Path, settings: JudgeSettings, tick: OnCount) -> JudgedCell:
    """Judge the newest rows of a cell, write the judge's rows, and compare the two."""
    rows = _newest(folder)
    judged = judge.judge(rows, settings, on_progress=tick)
    journal = results.Journal(folder / ROWS)
    journal.cut(0)
    journal.append(*(asdict(row) for row in judged))
    summary = score.summarise([*rows, *judged])
    cell = JudgedCell(judge.agreement(judged, rows), _shares(summary))
    record = judged[-1].detail["judge"] if judged else settings.record
    hashes = results.hashes(folder, [ROWS])
    document = {"judge": record, **cell.to_dict(), results.FILES: hashes}
    results.write_sealed(folder / results.JUDGED, document)
    return cell


def _newest(folder: Path) -> list[Row]:
    """Return the rows with generated answers of a cell; for a sequence, those at its last checkpoint."""
    lines = [line for line in results.Journal(folder / results.ROWS).records() if line["type"] == "case"]
    last = lines[-1]["edits"] if lines else None
    rows = [results.row_of(row) for line in lines if line["edits"] == last for row in line["rows"]]
    return [row for row in rows if row.protocol == headline_metric().name and "text_after" in row.detail]


def _shares(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return only the averages of the matcher and the judge."""
    return {
        key: entry
        for key, entry in summary.items()
        if (metric := metric_of(key.rpartition(".")[2])).by_judge or metric.headline
    }
