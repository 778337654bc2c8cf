"""What a metric is: a record with the functions that make its rows and its averages, and how tables show it.

One file of this package is one metric, or a few that belong together: it defines ``METRIC`` or ``METRICS``, and
:data:`errata.evaluation.metrics.REGISTRY` finds it. Scores, summaries, the command line and reports read the
records only. Nothing here loads torch, so that a report can read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from errata.evaluation.metrics import intervals
from errata.types import Form, Observation, Probe, Row

Side = Literal["before", "after"]
Summary = Mapping[str, Mapping[str, Any]]
"""Averages by ``"<kind>.<metric>"``, see :func:`errata.evaluation.metrics.summary.summarise`."""
SHARE = "share"
"""Unit of numbers in [0, 1], which tables show in per cent."""

SIDES: tuple[Side, Side] = ("before", "after")
LAST = 100
"""Place of metrics that name none."""


@dataclass(frozen=True)
class ProbeResult:
    """One probe of a case, with what the host answered before and after the edit."""

    case: str
    probe: Probe
    before: Observation
    after: Observation
    detail: Mapping[str, Any] = field(default_factory=dict)
    """What the detail of every row of it holds: the number of edits in place, of a sequence."""

    @property
    def kind(self) -> str:
        """The kind of its rows: chains of thought are never averaged together with direct answers."""
        return f"{self.probe.kind}.thought" if self.probe.form == "thought" else self.probe.kind

    def row(self, metric: str, before: float, after: float, **detail: Any) -> Row:
        """Build a row of this probe."""
        return Row(
            self.case, self.kind, metric, self.probe.prompt, float(before), float(after),
            {**self.detail, **detail},
        )  # fmt: skip


@dataclass(frozen=True)
class CaseResult:
    """All probes of a case, for rows that need several of them."""

    case: str
    probes: Sequence[ProbeResult]
    rows: Sequence[tuple[ProbeResult, Row]]
    """The metric's own rows of single probes."""
    detail: Mapping[str, Any]
    """What the detail of every row holds."""
    idf: Mapping[str, float] | None
    """Weights of words, where given; see :mod:`errata.evaluation.metrics.consistency`."""


@dataclass(frozen=True)
class Column:
    """A further number of a metric's summary that tables show beside its value."""

    number: str
    """Its name in the summary."""
    heading: str = ""
    """Its heading in tables; empty: pages carry it, no table shows it."""
    note: str = ""
    """What it says, below the table."""
    kinds: Literal["changing", "kept", "all"] = "all"
    """Of which kinds it is shown: those whose answers change, those whose answers must not, or both."""


@dataclass(frozen=True)
class PaperScore:
    """A score under the name and in the unit of a paper, read off a summary."""

    name: str
    value: Callable[[Summary, Side], float | None]
    """None where the summary does not allow it."""
    order: int = 0
    """Place among all scores; those of one place in the order of metrics, then of the file."""
    lead: int = 0
    """Place among the scores that stand first in tables, from 1; 0: none of them."""
    heading: str = ""
    """Its heading in a report's first table; empty: no column there."""


Rows = Callable[[ProbeResult], list[Row]]
CaseRows = Callable[[CaseResult], list[Row]]
Summarise = Callable[[Sequence[Row], Sequence[Row]], Mapping[str, Any]]


@dataclass(frozen=True)
class Metric:
    """A metric: what it scores, how it is averaged, and how tables show it."""

    name: str
    """The protocol of its rows, and the end of its keys in summaries: ``"<kind>.<name>"``."""
    label: str
    """A few words for headings, without the unit."""
    title: str = ""
    """Heading of its table in reports, what it measures and in which unit; by default label and unit."""
    unit: str = ""
    """``share`` for numbers in [0, 1], which tables show in per cent; a unit's name, e.g. ``nats``; or nothing."""
    higher_is_better: bool | None = None
    """None: neither, or it depends on the kind of probe."""
    judges: bool = False
    """Whether a row says right (1) or wrong (0). Then kinds whose answers must not change are averaged over what was
    right before; other metrics leave no row out."""
    compares: bool = False
    """Whether its one value compares before and after, so that a row's ``before`` means nothing."""
    forms: frozenset[Form] = frozenset()
    """Forms of probes that it scores."""
    needs_text: bool = False
    """Whether it reads generated texts, so that it has no rows where none were asked for."""
    check: Callable[[], None] | None = None
    """Raises ConfigError, before anything is run, where packages that it needs are not installed."""
    rows: Rows | None = None
    """Makes the rows of one probe; none where it does not apply."""
    case_rows: CaseRows | None = None
    """Makes rows of several probes of a case, after all rows of single ones."""
    summary: Summarise | None = None
    """Makes further numbers of a summary's entry, from all rows of one kind and from those that the average counts.
    By default, of metrics that do not judge: ``mean``, and an average of each number ``*_before`` or ``*_after`` in the
    rows' detail."""
    columns: tuple[Column, ...] = ()
    scores: tuple[PaperScore, ...] = ()
    order: int = LAST
    """Place among metrics in rows and tables; those of one place by name."""
    headline: bool = False
    """Whether reports rank by it: one metric only."""
    heading: str = ""
    """Heading of a column in a report's first table, which the terminal shows too; empty: the metric has a table of its
    own instead, on the page and the card."""
    heading_kinds: tuple[str, ...] = ()
    """The kind shown in that column: the first of these that was asked, else any."""
    by_judge: bool = False
    """Whether a language model made its rows after a run; reports name it together with its judge."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", self.title or self.label_and_unit)

    @property
    def label_and_unit(self) -> str:
        """The label with the unit: "KL, nats"; shares are told by their tables to be in per cent."""
        return self.label if self.unit in ("", SHARE) else f"{self.label}, {self.unit}"


def per_cent(name: str, key: str, number: str = "macro", *, order: int = 0, lead: int = 0) -> PaperScore:
    """Return a score in per cent: ``<number>_<side>`` of the summary's entry ``key``."""

    def value(summary: Summary, side: Side) -> float | None:
        share = number_of(summary, key, number, side)
        return None if share is None else 100 * share

    return PaperScore(name, value, order, lead)


def plain(name: str, key: str, number: str = "macro", *, order: int = 0) -> PaperScore:
    """Return a score as the summary has it: ``<number>_<side>`` of the entry ``key``."""
    return PaperScore(name, lambda summary, side: number_of(summary, key, number, side), order)


def number_of(summary: Summary, key: str, number: str, side: Side) -> float | None:
    """Return ``<number>_<side>`` of a summary's entry, None where it was not measured."""
    return summary.get(key, {}).get(f"{number}_{side}")


def by_case(
    rows: Iterable[Row], value: Callable[[Row], Any] = lambda row: row.after
) -> dict[str, list[float]]:
    """Collect a number of each row by case; rows where it is None are left out."""
    cases: dict[str, list[float]] = {}
    for row in rows:
        if (number := value(row)) is not None:
            cases.setdefault(row.case, []).append(float(number))
    return cases


def numbers(rows: Iterable[Row], name: str) -> list[float]:
    """List a number of the rows' detail, where they have it."""
    return [float(value) for row in rows if (value := row.detail.get(name)) is not None]


def averages(rows: Sequence[Row], names: Iterable[str]) -> dict[str, float | None]:
    """Average numbers of the rows' detail, inside a case first, as papers do."""
    return {
        name: intervals.macro(list(by_case(rows, lambda row, name=name: row.detail.get(name)).values()))
        for name in names
    }


def both_sides(*names: str) -> list[str]:
    """Return names with the ending of each side: ``answer`` is ``answer_before`` and ``answer_after``."""
    return [f"{name}_{side}" for name in names for side in SIDES]


def measured(rows: Sequence[Row]) -> list[str]:
    """List the numbers in the rows' detail that have sides, each in the order it first comes up."""
    names = dict.fromkeys(name for row in rows for name in row.detail)
    return [name for name in names if name.endswith(("_before", "_after")) and not name.startswith("text_")]
