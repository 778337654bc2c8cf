"""The record that defines a metric: the functions that compute its rows and averages, and how tables show it.

Each file of this package defines one metric (``METRIC``) or several related ones (``METRICS``), which
:data:`errata.evaluation.metrics.REGISTRY` finds. Scores, summaries, the command line and reports use only these
records. Nothing here loads torch, so that reports can use them.
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
"""Unit of numbers in [0, 1], shown in per cent."""

SIDES: tuple[Side, Side] = ("before", "after")
LAST = 100
"""Default of ``Metric.order``."""


@dataclass(frozen=True)
class ProbeResult:
    """One probe of a case, with its observations before and after the edit."""

    case: str
    probe: Probe
    before: Observation
    after: Observation
    detail: Mapping[str, Any] = field(default_factory=dict)
    """Entries added to the detail of each of its rows: in a sequence, the number of edits in place."""
    targets: tuple[str, ...] = ()
    """Targets of the case's requests."""
    old_targets: tuple[str, ...] = ()
    """Their old targets, where known."""

    @property
    def kind(self) -> str:
        """The kind of its rows; thoughts and steps have a kind of their own, so that averages keep them apart."""
        reasoned = self.probe.form in ("thought", "steps")
        return f"{self.probe.kind}.{self.probe.form}" if reasoned else self.probe.kind

    def row(self, metric: str, before: float, after: float, **detail: Any) -> Row:
        """Build a row for this probe."""
        return Row(
            self.case, self.kind, metric, self.probe.prompt, float(before), float(after),
            {**self.detail, **detail},
        )  # fmt: skip


@dataclass(frozen=True)
class CaseResult:
    """All probes of a case, for rows computed from several of them."""

    case: str
    probes: Sequence[ProbeResult]
    rows: Sequence[tuple[ProbeResult, Row]]
    """The metric's rows of single probes."""
    detail: Mapping[str, Any]
    """Entries added to the detail of each row."""
    idf: Mapping[str, float] | None
    """Inverse document frequencies of words; see :mod:`errata.evaluation.metrics.consistency`."""


@dataclass(frozen=True)
class Column:
    """A further number of a metric's summary, shown as a column next to its value."""

    number: str
    """Its name in the summary."""
    heading: str = ""
    """Its heading in tables; empty: in the page's data but in no table."""
    note: str = ""
    """Explanation below the table."""
    kinds: Literal["changing", "kept", "all"] = "all"
    """The kinds of probes it applies to: those whose answers change, those whose answers must not, or all."""


@dataclass(frozen=True)
class PaperScore:
    """A score with the name and unit of a paper, computed from a summary."""

    name: str
    value: Callable[[Summary, Side], float | None]
    """Returns None where the summary lacks what it needs."""
    order: int = 0
    """Sort key among all scores; ties are in the order of metrics, then of the file."""
    lead: int = 0
    """Position among the scores that tables show first, from 1; 0: not one of them."""
    heading: str = ""
    """Heading of its column in a report's first table; empty: no column."""


Rows = Callable[[ProbeResult], list[Row]]
CaseRows = Callable[[CaseResult], list[Row]]
Summarise = Callable[[Sequence[Row], Sequence[Row]], Mapping[str, Any]]


@dataclass(frozen=True)
class Metric:
    """A metric: what it scores, how it is averaged, and how tables show it."""

    name: str
    """The protocol of its rows, and the second part of its keys in summaries, ``"<kind>.<name>"``."""
    label: str
    """Short heading, without the unit."""
    title: str = ""
    """Heading of its table in reports: what it measures and its unit; default: label and unit."""
    unit: str = ""
    """``share`` for numbers in [0, 1], which tables show in per cent; a unit's name, e.g. ``nats``; or nothing."""
    higher_is_better: bool | None = None
    """None: neither, or depends on the kind of probe. True by default for metrics that judge."""
    judges: bool = False
    """Whether a row is right (1) or wrong (0), a share. Kinds whose answers must not change are then averaged over the
    probes that were right before; other metrics average all rows."""
    compares: bool = False
    """Whether its value compares before and after, so that a row's ``before`` has no meaning."""
    forms: frozenset[Form] = frozenset()
    """Forms of probes it scores."""
    needs_text: bool = False
    """Whether it needs generated texts; without generation it has no rows."""
    check: Callable[[], None] | None = None
    """Called before anything runs; raises ConfigError where required packages are not installed."""
    rows: Rows | None = None
    """Computes the rows of one probe; empty where the metric does not apply."""
    case_rows: CaseRows | None = None
    """Computes rows from several probes of a case, after all rows of single probes."""
    summary: Summarise | None = None
    """Computes further numbers of a summary's entry, from all rows of one kind and from the relevant ones, which the
    average includes. Default, for metrics that do not judge: ``mean``, and an average of each number ``*_before`` or
    ``*_after`` in the rows' detail."""
    columns: tuple[Column, ...] = ()
    scores: tuple[PaperScore, ...] = ()
    order: int = LAST
    """Sort key among metrics in rows and tables; ties are sorted by name."""
    headline: bool = False
    """Whether reports rank by it; true for one metric only."""
    heading: str = ""
    """Heading of its column in a report's first table, also in the terminal; empty: it has its own table instead, on
    the page and the card."""
    heading_kinds: tuple[str, ...] = ()
    """Kinds for that column, in order of preference; if none of them was evaluated, any kind."""
    by_judge: bool = False
    """Whether a language model computes its rows after a run; reports show the judge's name with it."""

    def __post_init__(self) -> None:
        if self.judges:
            object.__setattr__(self, "unit", self.unit or SHARE)
            object.__setattr__(self, "higher_is_better", self.higher_is_better is not False)
        object.__setattr__(self, "title", self.title or self.label_and_unit)

    @property
    def label_and_unit(self) -> str:
        """The label with the unit, e.g. "KL, nats"; shares have no unit, as table titles say per cent."""
        return self.label if self.unit in ("", SHARE) else f"{self.label}, {self.unit}"


def per_cent(name: str, key: str, number: str = "macro", *, order: int = 0, lead: int = 0) -> PaperScore:
    """Define a score in per cent: ``<number>_<side>`` of the summary's entry ``key``."""

    def value(summary: Summary, side: Side) -> float | None:
        share = number_of(summary, key, number, side)
        return None if share is None else 100 * share

    return PaperScore(name, value, order, lead)


def plain(name: str, key: str, number: str = "macro", *, order: int = 0) -> PaperScore:
    """Define a score in the summary's own unit: ``<number>_<side>`` of the entry ``key``."""
    return PaperScore(name, lambda summary, side: number_of(summary, key, number, side), order)


def number_of(summary: Summary, key: str, number: str, side: Side) -> float | None:
    """Return ``<number>_<side>`` of a summary's entry, None where it is missing."""
    return summary.get(key, {}).get(f"{number}_{side}")


def by_case(
    rows: Iterable[Row], value: Callable[[Row], Any] = lambda row: row.after
) -> dict[str, list[float]]:
    """Group a number of each row by case, skipping rows where it is None."""
    cases: dict[str, list[float]] = {}
    for row in rows:
        if (number := value(row)) is not None:
            cases.setdefault(row.case, []).append(float(number))
    return cases


def numbers(rows: Iterable[Row], name: str) -> list[float]:
    """List an entry of the rows' detail, for the rows that have it."""
    return [float(value) for row in rows if (value := row.detail.get(name)) is not None]


def averages(rows: Sequence[Row], names: Iterable[str]) -> dict[str, float | None]:
    """Average entries of the rows' detail, first within a case, then over cases, as papers do."""
    return {
        name: intervals.macro(list(by_case(rows, lambda row, name=name: row.detail.get(name)).values()))
        for name in names
    }


def side_averages(*names: str) -> Summarise:
    """Return a ``summary`` that averages ``<name>_before`` and ``<name>_after`` of the rows' detail, as papers do."""
    keys = [f"{name}_{side}" for name in names for side in SIDES]
    return lambda rows, relevant: averages(rows, keys)


def numbers_with_sides(rows: Sequence[Row]) -> list[str]:
    """List the numeric entries ``*_before`` and ``*_after`` in the rows' detail, in order of first occurrence."""
    names = dict.fromkeys(name for row in rows for name in row.detail)
    return [name for name in names if name.endswith(("_before", "_after")) and not name.startswith("text_")]
