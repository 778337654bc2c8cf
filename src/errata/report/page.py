"""The page: a single HTML file with data, style and scripts inside; no network, fonts or libraries needed."""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from errata.evaluation.metrics import REGISTRY, Metric, headline_metric
from errata.report import card, kinds, numbers, tables
from errata.report.board import Board, Entry, absent, boards, model_name
from errata.report.curves import Age, Checkpoint
from errata.report.details import Details
from errata.report.files import write
from errata.report.measure import Measure
from errata.report.published import PROVENANCE, Comparison, comparisons
from errata.report.read import Run, number
from errata.report.style import style_of

CASES = 100
"""Default number of cases per cell with their texts."""
STYLES = ("style.css",)
SCRIPTS = ("base.js", "board.js", "charts.js", "cases.js", "main.js")


def write_page(path: str | os.PathLike[str], runs: Sequence[Run], *, cases: int = CASES) -> Path:
    """Write the page. Raises DataError where the path cannot be written."""
    return write(path, page(runs, cases=cases))


def page(runs: Sequence[Run], *, cases: int = CASES) -> str:
    """Return the page of some runs. ``cases``: number of cases per cell with their texts."""
    every_board = boards(runs)
    data = _document(runs, every_board, cases)
    parts = {
        "TITLE": html.escape(data["title"]),
        "STYLE": "\n".join(map(_asset, STYLES)),
        "SCRIPT": "\n".join(map(_asset, SCRIPTS)),
        "DATA": _embedded(data),
        "STATIC": _static(runs, every_board),
    }
    # in one pass, so that a placeholder inside the data is not replaced
    return re.sub(r"@@([A-Z]+)@@", lambda match: parts[match[1]], _asset("page.html"))


def document(runs: Sequence[Run], *, cases: int = CASES) -> dict[str, Any]:
    """Return all data of the page, JSON-ready; texts of cases are indices of strings, see ``details``."""
    return _document(runs, boards(runs), cases)


def _document(runs: Sequence[Run], every_board: Sequence[Board], cases: int) -> dict[str, Any]:
    details = Details(cases)
    return {
        "title": card.heading(runs),
        "runs": [{"name": run.name, "facts": card.run_facts(run)} for run in runs],
        "boards": [_board(board, details) for board in every_board],
        "published": [_published(one) for one in comparisons(runs, every_board)],
        "absent": [
            {
                "method": cell.name,
                "model": model_name(cell),
                "dataset": str(cell.plan.get("dataset", "")),
                "schedule": str(cell.plan.get("schedule", "")),
                "status": cell.status,
                "reason": tables.reason_of(cell.reason),
                "trace": cell.reason if "\n" in cell.reason else "",
            }
            for cell in absent(runs)
        ],
        "metrics": _metrics(every_board),
        "details": details.document(),
    }


def _board(board: Board, details: Details) -> dict[str, Any]:
    return {
        "title": board.title,
        "model": board.model,
        "schedule": board.schedule,
        "tag": {name: value for name, value in board.tag.items() if value is not None},
        "explained": "; ".join(filter(None, (board.headline_text, board.earlier_text))),
        "unedited_cases": tables.refused_cases(board),
        "headline": list(board.headline),
        "groups": dict(kinds.GROUPS),
        "primary": headline_metric().name,
        "paper": [{"name": score.name, "title": score.name} for score in tables.board_scores()],
        "extras": [_extra(metric) for metric in board.extras()],
        "kinds": [_kind(kind, board) for kind in board.kinds],
        "others": [_protocol(board, protocol) for protocol in board.others()],
        "scores": tables.scores_of(board),
        "beside": [list(one) for one in tables.strict_shares(board)],
        "entries": [_entry(entry, board, details) for entry in board.entries],
    }


def _kind(kind: str, board: Board) -> dict[str, Any]:
    must_stay = kind in board.preserved
    return {"id": kind, "label": kinds.label(kind), "group": board.group(kind), "kept": must_stay}


def _protocol(board: Board, protocol: str) -> dict[str, Any]:
    probe_kinds = {kind for entry in board.entries for kind in entry.measures.get(protocol, {})}
    return {
        "id": protocol,
        "title": tables.protocol_title(protocol),
        "share": numbers.is_share(protocol),
        "kinds": [_kind(kind, board) for kind in kinds.order(probe_kinds, board.preserved)],
    }


def _extra(metric: Metric) -> dict[str, Any]:
    """Describe a metric's column in the first table."""
    return {
        "id": metric.name,
        "title": metric.heading,
        "share": metric.unit == "share",
        "up": metric.higher_is_better is False,
    }


def _metrics(every_board: Sequence[Board]) -> dict[str, Any]:
    """Return label, unit and direction of the metrics of some boards, by protocol."""
    names = dict.fromkeys(name for board in every_board for entry in board.entries for name in entry.measures)
    return {
        name: {"label": metric.label, "unit": metric.unit, "compares": metric.compares}
        for name in names
        if (metric := numbers.metric(name))
    }


def _entry(entry: Entry, board: Board, details: Details) -> dict[str, Any]:
    cell = entry.cell
    curves = entry.curves
    scores = {name: number(value) for name, value in (cell.result.get("scores") or {}).items()}
    return {
        **{metric.name: _rounded(extra.value if (extra := entry.extra(metric)) else None)
           for metric in REGISTRY.values() if metric.heading},
        "id": cell.id,
        "name": cell.name + tables.seed_of(entry, board),
        "method": cell.method,
        "role": entry.role,
        "style": list(style_of(cell.name)),
        "settings": dict(cell.plan.get("settings") or {}),
        "host": cell.result.get("host") or {},
        "headline": _measure(entry.headline),
        "earlier": _measure(entry.earlier_headline),
        "over": _measure(entry.over_tuning),
        "measures": {
            protocol: {kind: _measure(measure) for kind, measure in of_kinds.items()}
            for protocol, of_kinds in entry.measures.items()
        },
        "scores": {name: _rounded(value) for name, value in scores.items()},
        "perplexity": list(map(_rounded, tables.perplexities(entry))),
        "fit": _rounded(tables.fit_median(entry)),
        "cost": tables.cost_of(entry),
        "retention": [_age(age) for age in curves.retention] if curves else [],
        "looks": [_checkpoint(checkpoint) for checkpoint in curves.checkpoints] if curves else [],
        "details": details.add(cell),
    }  # fmt: skip


def _age(age: Age) -> list[Any]:
    return [age.first, age.last, *_ends(age.success), age.success.n]


def _checkpoint(checkpoint: Checkpoint) -> list[Any]:
    values = (checkpoint.newest, checkpoint.perplexity, checkpoint.perplexity_before, checkpoint.norm_ratio)
    return [checkpoint.edits, *_ends(checkpoint.efficacy), *map(_rounded, values), list(checkpoint.alarms)]


def _measure(measure: Measure | None) -> list[Any] | None:
    if measure is None:
        return None
    more = {name: _rounded(value) for name, value in measure.more.items()}
    return [*_ends(measure), _rounded(measure.before), measure.n, *([more] if more else [])]


def _ends(measure: Measure | None) -> list[Any]:
    if measure is None:
        return [None, None, None]
    return [_rounded(measure.value), _rounded(measure.low), _rounded(measure.high)]


def _rounded(value: float | None) -> float | str | None:
    """Round to five significant digits; numbers that JSON cannot represent become text."""
    if value is None:
        return None
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)


def _published(one: Comparison) -> dict[str, Any]:
    return {
        "title": one.title,
        "source": one.source,
        "setting": one.setting,
        "provenance": one.provenance,
        "meaning": PROVENANCE.get(one.provenance, "unknown"),
        "convention": one.convention,
        "tolerance": one.tolerance,
        "board": one.board,
        "lines": [
            [line.method, line.score, line.published, _rounded(line.measured), line.within, line.provenance]
            for line in one.lines
        ],
    }


def _embedded(data: Mapping[str, Any]) -> str:
    """Encode JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=str)
    for sign in ("<", ">", "\u2028", "\u2029"):
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _static(runs: Sequence[Run], every_board: Sequence[Board]) -> str:
    """Return the tables as plain HTML, for browsers without scripts."""
    parts = []
    for section in tables.sections(every_board, brief=True):
        parts += [f"<h2>{html.escape(section.title)}</h2>", f"<p>Protocol: {html.escape(section.tag)}</p>"]
        parts += map(_static_table, section.tables)
    absent_cells = tables.absent_table(runs)
    return "\n".join([*parts, *([_static_table(absent_cells)] if absent_cells else [])])


def _static_table(table: tables.Table) -> str:
    head = _cells(table.columns, "th")
    rows = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in table.rows)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
    caption = html.escape(table.title)
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{notes}"


def _cells(texts: Iterable[str], tag: str) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _asset(name: str) -> str:
    return resources.files("errata.report").joinpath("page").joinpath(name).read_text(encoding="utf-8")
