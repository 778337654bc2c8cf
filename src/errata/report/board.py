"""Boards: a leaderboard of all cells with the same protocol, with a headline score and its interval."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from errata.evaluation.metrics import REGISTRY, Metric, headline_metric, metric_of
from errata.evaluation.metrics.intervals import RESAMPLES
from errata.evaluation.metrics.probability import harmonic
from errata.report import kinds, numbers
from errata.report.curves import Curves, curves
from errata.report.measure import Measure
from errata.report.read import Cell, Run, number
from errata.report.tally import Counts, Tally, tally

CHUNK = 500
"""Resamples in memory at once."""
FINE_TUNING = "fine-tuning"
"""Role of the baseline that methods are compared with."""
EARLIER = "earlier headline"
"""Heading of the headline score of earlier versions."""
EARLIER_ROLES = {
    "unedited": (0, "the floor, nothing edited"),
    "in_prompt": (1, "the oracle, the fact before every prompt"),
}
"""Rank and role of baselines in older runs, whose cells do not record them."""


@dataclass(frozen=True)
class Entry:
    """A cell's row on a board."""

    cell: Cell
    headline: Measure | None
    earlier_headline: Measure | None
    """The headline of earlier versions, where it has other parts."""
    over_tuning: Measure | None
    """Headline minus that of fine-tuning, on the same cases, with a paired interval."""
    measures: Mapping[str, Mapping[str, Measure]]
    """By protocol, then by kind."""
    curves: Curves | None = None
    """Retention and collapse curves, for a sequence."""

    def measure(self, protocol: str, kind: str) -> Measure | None:
        """Return a measure, or None where it was not measured."""
        return self.measures.get(protocol, {}).get(kind)

    def main_measure(self, kind: str) -> Measure | None:
        """Return the measure of a kind under the protocol that boards rank by."""
        return self.measure(headline_metric().name, kind)

    def extra(self, metric: Metric) -> Measure | None:
        """Return the measure of a metric's column in the first table: its preferred kind, else the first."""
        of_kinds = self.measures.get(metric.name, {})
        preferred = (of_kinds[kind] for kind in metric.heading_kinds if kind in of_kinds)
        return next(preferred, next(iter(of_kinds.values()), None))

    @property
    def role(self) -> str:
        """The role of a baseline; empty for a method under test."""
        return _place(self.cell)[1]


@dataclass(frozen=True)
class Board:
    """All cells of one protocol."""

    model: str
    schedule: str
    tag: Mapping[str, Any]
    entries: tuple[Entry, ...]
    """Baselines first, then by headline."""
    kinds: tuple[str, ...]
    """Kinds measured under free generation, which boards rank by, in column order."""
    preserved: frozenset[str]
    """Kinds whose answers must not change."""
    headline: tuple[str, ...]
    """Kinds whose harmonic mean is the headline score."""
    earlier_headline: tuple[str, ...] = ()
    """The same for the headline of earlier versions; empty where it is the same score."""

    @property
    def title(self) -> str:
        """The board's title: model, dataset and schedule."""
        return f"{self.model} · {self.tag.get('dataset', '?')} · {self.schedule}"

    @property
    def headline_text(self) -> str:
        """How the headline score is computed."""
        if not self.headline:
            names = ", ".join(kinds.label(options[0]) for options in kinds.headline_parts())
            return f"no headline: none of {names} was evaluated by free generation"
        parts = [kinds.label(kind) + (" kept" if kind in self.preserved else "") for kind in self.headline]
        if len(parts) == 1:
            return f"headline: {parts[0]} under free generation"
        return f"headline: harmonic mean of {', '.join(parts[:-1])} and {parts[-1]} under free generation"

    @property
    def earlier_text(self) -> str:
        """How the headline of earlier versions differs; empty where it does not."""
        left_out = [kinds.label(kind) for kind in self.headline if kind not in self.earlier_headline]
        return (
            f"{EARLIER}: as in earlier versions, without {', '.join(left_out)}"
            if self.earlier_headline
            else ""
        )

    def others(self) -> list[str]:
        """List protocols with tables of their own: those without a column in the first table."""
        names = {protocol for entry in self.entries for protocol in entry.measures}
        records = {name: numbers.metric(name) for name in names}
        own = [name for name in names if not (records[name].headline or records[name].heading)]
        return sorted(own, key=lambda name: (records[name].order, name))

    def extras(self) -> list[Metric]:
        """List the further metrics with a column in the first table, where measured."""
        return [
            metric
            for metric in REGISTRY.values()
            if metric.heading and any(entry.extra(metric) is not None for entry in self.entries)
        ]

    def group(self, kind: str) -> str:
        """Return the group of a kind on this board."""
        return kinds.group(kind, self.preserved)


def boards(runs: Sequence[Run]) -> list[Board]:
    """Group the finished cells of all runs into boards, one for each protocol."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells_with_results(runs):
        groups.setdefault(_key(cell), []).append(cell)
    return [_board(cells) for cells in groups.values()]


def cells_with_results(runs: Sequence[Run]) -> list[Cell]:
    """List cells with results; for a cell in several runs, the first."""
    return [cell for cell in _distinct_cells(runs) if cell.status == "done" and cell.summary]


def absent(runs: Sequence[Run]) -> list[Cell]:
    """List cells without results: refused, failed or unfinished in every run that has them."""
    return [cell for cell in _distinct_cells(runs) if cell.status != "done" or not cell.summary]


def _distinct_cells(runs: Sequence[Run]) -> list[Cell]:
    first_of: dict[str, Cell] = {}
    for cell in (cell for run in runs for cell in run.cells):
        if cell.id not in first_of or (first_of[cell.id].status != "done" and cell.status == "done"):
            first_of[cell.id] = cell
    return list(first_of.values())


def model_name(cell: Cell) -> str:
    """Return the name of a cell's model in its recipe."""
    model = cell.plan.get("model")
    if isinstance(model, Mapping):
        model = model.get("label") or model.get("name")
    return str(model or (cell.result.get("host") or {}).get("name") or "?")


def _key(cell: Cell) -> str:
    host = cell.result.get("host") or {}
    parts = [model_name(cell), host.get("fingerprint"), str(cell.plan.get("schedule")), dict(cell.tag)]
    return json.dumps(parts, sort_keys=True, default=str)


def _board(cells: Sequence[Cell]) -> Board:
    keys = (key.rpartition(".") for cell in cells for key in cell.summary)
    measured_kinds = {kind for kind, _, protocol in keys if protocol == headline_metric().name}
    tallies = [tally(cell) for cell in cells]
    preserved = frozenset(kind for kind in measured_kinds if _must_not_change(kind, tallies))
    measured_parts = (
        next((k for k in options if k in measured_kinds), None) for options in kinds.headline_parts()
    )
    parts = tuple(kind for kind in measured_parts if kind)
    scores = _headlines(cells, tallies, parts)
    earlier_parts = kinds.earlier_headline(parts)
    earlier_scores = _headlines(cells, tallies, earlier_parts)
    entries = [
        Entry(cell, value, earlier, difference, _measures(cell), curves(cell, counts))
        for cell, counts, (value, difference), (earlier, _) in zip(
            cells, tallies, scores, earlier_scores, strict=True
        )
    ]
    entries.sort(
        key=lambda e: (
            not e.cell.baseline,
            _place(e.cell)[0],
            -(e.headline.value if e.headline else -1.0),
            e.cell.name,
        )
    )
    return Board(
        model_name(cells[0]), str(cells[0].plan.get("schedule", "?")), cells[0].tag, tuple(entries),
        tuple(kinds.order(measured_kinds, preserved)), preserved, parts, earlier_parts,
    )  # fmt: skip


def _must_not_change(kind: str, tallies: Sequence[Tally]) -> bool:
    changes = [one.changes[kind] for one in tallies if kind in one.changes]
    return not any(changes) if changes else kinds.group(kind) == "kept"


def _measures(cell: Cell) -> dict[str, dict[str, Measure]]:
    table: dict[str, dict[str, Measure]] = {}
    judge = cell.verdicts.get("judge") or {}
    # verdicts of different judges, or of one judge with different prompts, are never in one column
    by = f" by {judge.get('model')}, prompt {str(judge.get('prompt_sha256'))[:8]}"
    by_judge = {f"{key}{by}": entry for key, entry in (cell.verdicts.get("summary") or {}).items()
              if metric_of(key.rpartition(".")[2]).by_judge}  # fmt: skip
    for key, entry in [*cell.summary.items(), *by_judge.items()]:
        head, mark, name = key.partition(" by ")
        kind, _, protocol = head.rpartition(".")
        protocol += mark + name
        value = number(entry.get("after"))
        if value is None:
            continue
        low, high = (number(end) for end in entry.get("ci") or (None, None))
        columns = (column.number for column in numbers.metric(protocol).columns)
        more = {name: more for name in columns if (more := number(entry.get(name))) is not None}
        measure = Measure(value, low, high, number(entry.get("before")), entry.get("n"), more)
        table.setdefault(protocol, {})[kind] = measure
    return table


def _headlines(
    cells: Sequence[Cell], tallies: Sequence[Tally], parts: Sequence[str]
) -> list[tuple[Measure | None, Measure | None]]:
    """Return each cell's headline score and its difference to fine-tuning, both with intervals."""
    values = [_harmonic([_after(cell, kind) for kind in parts]) for cell in cells]
    samples = _draws([one.last for one in tallies], parts) if parts else None
    headlines: list[tuple[Measure | None, Measure | None]] = []
    for i, value in enumerate(values):
        if value is None:
            headlines.append((None, None))
            continue
        difference = None
        tuning = _tuning(cells, cells[i])
        base = None if tuning is None else values[tuning]
        if tuning is not None and base is not None and not cells[i].baseline:
            paired = None
            if samples is not None and tallies[i].last.keys() == tallies[tuning].last.keys():
                paired = samples[:, i] - samples[:, tuning]
            difference = Measure(value - base, *_interval(paired))
        headlines.append((Measure(value, *_interval(None if samples is None else samples[:, i])), difference))
    return headlines


def _tuning(cells: Sequence[Cell], cell: Cell) -> int | None:
    """Return the index of the fine-tuning cell to compare with: one with the same seed if there is one."""
    baselines = [i for i, c in enumerate(cells) if _place(c)[1] == FINE_TUNING]
    own = [i for i in baselines if cells[i].plan.get("seed") == cell.plan.get("seed")]
    return next(iter(own or baselines), None)


def _place(cell: Cell) -> tuple[int, str]:
    """Return a baseline's rank and role; (0, "") for a method under test."""
    if not cell.baseline:
        return 0, ""
    role = cell.plan.get("role")
    if not role:
        return EARLIER_ROLES.get(cell.method, (2, FINE_TUNING))
    return int(cell.plan.get("rank") or 0), str(role)


def _after(cell: Cell, kind: str) -> float | None:
    return number(cell.summary.get(f"{kind}.{headline_metric().name}", {}).get("after"))


def _harmonic(values: Iterable[float | None]) -> float | None:
    every_value = list(values)
    if not every_value or any(value is None for value in every_value):
        return None
    return harmonic([value for value in every_value if value is not None])


def _interval(samples: np.ndarray | None) -> tuple[float | None, float | None]:
    if samples is None or not np.isfinite(samples).all():
        return None, None
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)


def _draws(counts: Sequence[Counts], parts: Sequence[str]) -> np.ndarray | None:
    """Bootstrap over cases, the same resamples for every cell; return headline scores ``[resamples, cells]``.

    None without rows. NaN where a cell has no probe of a kind in a resample.
    """
    cases = sorted({case for one in counts for case in one})
    if not cases:
        return None
    table = np.zeros((2, len(cases), len(counts) * len(parts)))
    for j, (one, part) in enumerate((one, part) for one in counts for part in parts):
        for i, case in enumerate(cases):
            table[:, i, j] = one.get(case, {}).get(part, (0.0, 0))
    rng = np.random.default_rng(0)
    headlines = []
    for first in range(0, RESAMPLES, CHUNK):
        size = min(CHUNK, RESAMPLES - first)
        weight = rng.multinomial(len(cases), [1 / len(cases)] * len(cases), size=size).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            shares = (weight @ table[0]) / (weight @ table[1])  # [size, cells * parts]
            shares = shares.reshape(size, len(counts), len(parts))
            means = len(parts) / (1 / shares).sum(-1)
        headlines.append(np.where((shares == 0).any(-1), 0.0, means))
    return np.concatenate(headlines)
