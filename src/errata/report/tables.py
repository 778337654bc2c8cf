"""Tables of plain texts, for the terminal and the card: one set a board, protocols never mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.evaluation.metrics import Column, PaperScore, headline_metric
from errata.evaluation.metrics.intervals import mean
from errata.evaluation.metrics.summary import paper_scores
from errata.report import kinds, numbers
from errata.report.board import Board, Entry, absent, model_name
from errata.report.curves import Curves
from errata.report.published import PROVENANCE, Comparison
from errata.report.read import Run, number


@dataclass(frozen=True)
class Table:
    """One table of texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """Tables that belong to one board."""

    title: str
    tag: str
    tables: tuple[Table, ...]


def tag_line(tag: Mapping[str, Any]) -> str:
    """Word a protocol tag on one line; the dataset stands with the head of its hash."""
    parts = dict(tag)
    dataset, sha = parts.pop("dataset", None), parts.pop("dataset_sha256", None)
    words = [] if dataset is None else [f"{dataset}@{str(sha)[:12]}" if sha else str(dataset)]
    words += [f"{name}={value}" for name, value in parts.items() if value is not None]
    return " · ".join(words) or "no tag"


def sections(boards: Sequence[Board], *, brief: bool = False) -> list[Section]:
    """Make every board's tables. ``brief``: only the first ones, intervals in few characters, for a terminal."""
    made = []
    for board in boards:
        tables: list[Table | None] = [_main(board, brief), _further(board, brief)]
        if not brief:
            tables.append(_beside(board))
            tables += [_protocol(board, protocol) for protocol in board.others()]
            tables += [_scores(board), _looks(board), _cost(board)]
        tables.append(_retention(board, brief))
        kept = tuple(table for table in tables if table is not None)
        made.append(Section(board.title, tag_line(board.tag), kept))
    return made


def _names(board: Board) -> list[str]:
    return [f"{e.cell.name}{seed_of(e, board)}" + (" *" if e.cell.baseline else "") for e in board.entries]


def seed_of(entry: Entry, board: Board) -> str:
    """Name a cell's seed where its board has several."""
    seeds = {e.cell.plan.get("seed") for e in board.entries}
    return f" (seed {entry.cell.plan.get('seed')})" if len(seeds) > 1 else ""


def _heading(kind: str, board: Board, *, short: bool = False) -> str:
    return kinds.label(kind, short=short) + (" kept" if kind in board.kept else "")


def _main(board: Board, brief: bool) -> Table:
    shown = [kind for kind in board.kinds if kinds.is_main(kind)]
    rest = {
        **{score.heading: [score_of(e, score.name) for e in board.entries] for score in board_scores()},
        **{metric.heading: [numbers.value(e.extra(metric), metric.name) for e in board.entries]
           for metric in board.extras()},
        "ppl after" if brief else "perplexity": [_perplexity(e, brief) for e in board.entries],
        "s/edit": [numbers.seconds(fit_median(e)) for e in board.entries],
    }  # fmt: skip
    extra = {k: v for k, v in rest.items() if any(cell != numbers.NONE for cell in v)}
    rows = [
        (
            name,
            numbers.share(e.headline, brief=brief),
            *(numbers.share(e.main_measure(kind), brief=brief) for kind in shown),
            *(column[i] for column in extra.values()),
        )
        for i, (name, e) in enumerate(zip(_names(board), board.entries, strict=True))
    ]
    heads = [_heading(kind, board, short=brief) for kind in shown]
    columns = ("method", "headline", *heads, *extra)
    notes = [
        board.explained,
        "per cent, with 95 % intervals over resampled cases; what is kept counts among what was right before",
        "* baseline: " + "; ".join(f"{e.cell.name} is {e.role}"
                                   for e in board.entries if e.cell.baseline),
    ]  # fmt: skip
    baseline = any(e.cell.baseline for e in board.entries)
    told = [*(notes if baseline else notes[:2]), *refused_cases(board)]
    return Table("free generation", columns, tuple(rows), tuple(told))


def refused_cases(board: Board) -> list[str]:
    """Say of which methods some cases are not edited: they stay in all shares, as the unedited model answers."""
    told = []
    for entry in board.entries:
        refused = entry.cell.found.get("refused_cases") or []
        if refused:
            what = "1 case, which counts" if len(refused) == 1 else f"{len(refused)} cases, which count"
            first = f"{refused[0]['case']}: {refused[0]['reason']}"
            told.append(f"{entry.cell.name} could not edit {what} as unedited; the first, {first}")
    return told


def _further(board: Board, brief: bool) -> Table | None:
    shown = [kind for kind in board.kinds if not kinds.is_main(kind)]
    tuned = any(e.over_tuning for e in board.entries)
    if not shown and not tuned:
        return None
    rows = [
        (
            name,
            *([numbers.share(e.over_tuning, signed=True)] if tuned else []),
            *(numbers.share(e.main_measure(kind), brief=brief) for kind in shown),
        )
        for name, e in zip(_names(board), board.entries, strict=True)
    ]
    columns = ("method", *(["over fine-tuning"] if tuned else []), *(_heading(k, board) for k in shown))
    note = "over fine-tuning: difference of headlines in points, paired over cases; an interval below zero: it loses"
    return Table("free generation, further kinds", columns, tuple(rows), (note,) if tuned else ())


def beside(board: Board) -> list[tuple[str, str, str]]:
    """List the further shares of free generation, of the main kinds: heading, kind and name in the summary."""
    return [
        (f"{kinds.label(kind)}, {column.heading}", kind, column.number)
        for kind in board.kinds if kinds.is_main(kind)
        for column in headline_metric().columns
        if column.heading and column.kinds in ("all", "kept" if kind in board.kept else "changing")
        and any((m := e.main_measure(kind)) is not None and column.number in m.more for e in board.entries)
    ]  # fmt: skip


def _beside(board: Board) -> Table | None:
    shown = beside(board)
    rows = []
    for name, e in zip(_names(board), board.entries, strict=True):
        shares = [m.more.get(more) if (m := e.main_measure(kind)) else None for _, kind, more in shown]
        rows.append((name, *map(numbers.percent, shares)))
    note = "; ".join(f"{c.heading}: {c.note}" for c in headline_metric().columns if c.note)
    columns = ("method", *(heading for heading, _, _ in shown))
    return Table("free generation, strictly", columns, tuple(rows), (note,)) if shown else None


def _protocol(board: Board, protocol: str) -> Table | None:
    """Make a protocol's own table: its value by kind, then the further numbers that its metric names."""
    probe_kinds = {kind for e in board.entries for kind in e.measures.get(protocol, {})}
    shown = kinds.order(probe_kinds, board.kept)
    further = [
        (kind, column)
        for kind in shown
        for column in numbers.metric(protocol).columns
        if column.heading and any(_number(e, protocol, kind, column) is not None for e in board.entries)
    ]
    show = numbers.percent if numbers.is_share(protocol) else numbers.plain
    rows = [
        (
            name,
            *(numbers.quantity(e.measure(protocol, kind), protocol) for kind in shown),
            *(show(_number(e, protocol, kind, column)) for kind, column in further),
        )
        for name, e in zip(_names(board), board.entries, strict=True)
    ]
    heads = (f"{_heading(kind, board)}, {column.heading}" for kind, column in further)
    columns = ("method", *(_heading(kind, board) for kind in shown), *heads)
    notes = dict.fromkeys(f"{column.heading}: {column.note}" for _, column in further if column.note)
    return Table(protocol_title(protocol), columns, tuple(rows), tuple(notes)) if shown else None


def _number(entry: Entry, protocol: str, kind: str, column: Column) -> float | None:
    measure = entry.measure(protocol, kind)
    return measure.more.get(column.number) if measure else None


def protocol_title(protocol: str) -> str:
    """Word a protocol for a heading, with the judge where there is one."""
    _, mark, judge = protocol.partition(" by ")
    return numbers.metric(protocol).title + mark.replace(" by ", ", by ") + judge


def score_of(entry: Entry, name: str) -> str:
    """Show a legacy score by its paper's name, which is in per cent."""
    value = number((entry.cell.found.get("scores") or {}).get(name))
    return numbers.NONE if value is None else f"{value:.1f}"


def scores_of(board: Board) -> list[str]:
    """List the legacy scores that a board's cells have, in the papers' names."""
    measured = (name for e in board.entries for name, v in (e.cell.found.get("scores") or {}).items()
                if number(v) is not None)  # fmt: skip
    lead = sorted((score for score in paper_scores() if score.lead), key=lambda score: score.lead)
    first = [score.name for score in lead]
    names = list(dict.fromkeys(measured))
    return [n for n in first if n in names] + [n for n in names if n not in first]


def board_scores() -> list[PaperScore]:
    """List the legacy scores that have a column in the first table."""
    return [score for score in paper_scores() if score.heading]


def _scores(board: Board) -> Table | None:
    names = scores_of(board)
    if not names:
        return None
    rows = [
        (name, *(score_of(e, score) for score in names))
        for name, e in zip(_names(board), board.entries, strict=True)
    ]
    title = "legacy scores in the papers' names, for comparison with papers only"
    return Table(title, ("method", *names), tuple(rows))


def _worn(board: Board) -> list[tuple[str, Curves]]:
    found = zip(_names(board), board.entries, strict=True)
    return [(name, entry.curves) for name, entry in found if entry.curves is not None]


def _looks(board: Board) -> Table | None:
    rows = [
        (
            name, f"{look.edits:,}", numbers.share(look.efficacy), numbers.percent(look.newest),
            f"{numbers.plain(look.perplexity_before)} > {numbers.plain(look.perplexity)}",
            numbers.plain(look.norm_ratio), "; ".join(look.alarms),
        )
        for name, c in _worn(board) for look in c.looks
    ]  # fmt: skip
    columns = ("method", "edits", "efficacy", "newest", "perplexity", "norm ratio", "alarm")
    note = "efficacy: all edits so far; newest: those made last; norm ratio: largest |change| / |weight|"
    return Table("as edits add up", columns, tuple(rows), (note,)) if rows else None


def _retention(board: Board, brief: bool) -> Table | None:
    worn = _worn(board)
    ages = sorted({(a.first, a.last) for _, c in worn for a in c.retention})
    if not ages:
        return None
    rows = []
    for name, c in worn:
        found = {(a.first, a.last): a.success for a in c.retention}
        rows.append((name, *(numbers.share(found.get(age), brief=brief) for age in ages)))
    heads = tuple(f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in ages)
    note = "age: how many edits were made after it; per cent, free generation"
    return Table(
        "still answered with the target, by age of the edit", ("method", *heads), tuple(rows), (note,)
    )


def fit_median(entry: Entry) -> float | None:
    """Return the median seconds of a fit; None where nothing was fitted."""
    cost = entry.cell.found.get("cost") or {}
    return number((cost.get("fit") or {}).get("median"))


def perplexities(entry: Entry) -> tuple[float | None, float | None]:
    """Return the perplexity of neutral text before and after: at a sequence's end, or on average over batches."""
    looks = entry.cell.looks[-1:] if entry.cell.sequence else entry.cell.looks
    before = [v for look in looks if (v := number(look.get("perplexity_before"))) is not None]
    after = [v for look in looks if (v := number(look.get("perplexity_after"))) is not None]
    return mean(before), mean(after)


def _perplexity(entry: Entry, brief: bool) -> str:
    before, after = perplexities(entry)
    if brief:
        return numbers.plain(after)
    return numbers.NONE if after is None else f"{numbers.plain(before)} > {numbers.plain(after)}"


def cost_of(entry: Entry) -> dict[str, str]:
    """Word what a cell took, by name of the figure; what was not measured is left out."""
    cost = entry.cell.found.get("cost") or {}
    fit, observe, overhead = (cost.get(name) or {} for name in ("fit", "observe", "latency_overhead"))
    memory = number(cost.get("peak_memory_mb"))
    fitted = fit_median(entry) is not None
    found = {
        "set-up": numbers.seconds(number(cost.get("setup_seconds"))),
        "fit median": numbers.seconds(fit_median(entry)),
        "fit p95": numbers.seconds(number(fit.get("p95"))),
        "fit total": numbers.seconds(number(fit.get("total")) if fitted else None),
        "observe a case": numbers.seconds(number(observe.get("per_case"))),
        "peak memory": numbers.size(None if memory is None else memory * 2**20),
        "an edit's size": numbers.size(number(cost.get("bytes_per_edit"))),
        "prefill slower": _slower(overhead.get("prefill")),
        "decode slower": _slower(overhead.get("decode")),
    }
    restored = entry.cell.found.get("weights_restored")
    if restored is not None:
        found["weights"] = "restored" if restored else "NOT RESTORED"
    return {name: text for name, text in found.items() if text != numbers.NONE}


def _slower(value: Any) -> str:
    overhead = number(value)
    return numbers.NONE if overhead is None else f"{100 * overhead:.0f} %"


def _cost(board: Board) -> Table | None:
    found = [cost_of(e) for e in board.entries]
    names = list(dict.fromkeys(name for one in found for name in one))
    rows = [
        (name, *(one.get(column, numbers.NONE) for column in names))
        for name, one in zip(_names(board), found, strict=True)
    ]
    return Table("cost", ("method", *names), tuple(rows)) if names else None


def absent_table(runs: Sequence[Run]) -> Table | None:
    """List cells that have no results, with the reason; None where every cell has some."""
    rows = []
    for cell in absent(runs):
        plan = cell.plan
        missing = "no result file yet" if cell.status == "unfinished" else "no rows that count"
        reason = reason_of(cell.reason) or missing
        if cell.status == "unfinished" and cell.cases:
            reason = f"{cell.cases} cases so far"
        rows.append((
            cell.name, model_name(cell), str(plan.get("dataset", "")), str(plan.get("schedule", "")),
            cell.status, reason,
        ))  # fmt: skip
    columns = ("method", "model", "dataset", "schedule", "status", "reason")
    return Table("not on a board", columns, tuple(rows)) if rows else None


def reason_of(reason: str) -> str:
    """Return what a reason comes to: of a traceback its last line."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def published_tables(comparisons: Sequence[Comparison], *, brief: bool = False) -> list[Table]:
    """Make a table of every comparison; figures from memory are never printed.

    ``brief``: only lines that were measured, maybe none.
    """
    columns = ("method", "score", "published", "provenance", "measured", "difference", "tolerance")
    made = []
    for one in comparisons:
        rows = [
            (
                line.method, line.score, figure(line.published), line.provenance, figure(line.measured),
                numbers.NONE if line.difference is None else f"{line.difference:+.2f}",
                {None: "", True: "within", False: "outside"}[line.within],
            )
            for line in one.lines if line.measured is not None or not brief
        ]  # fmt: skip
        missing = "measured: no board has this model, dataset and schedule"
        notes = [
            f"{one.source}; {one.setting}".strip("; "),
            f"provenance: {one.provenance}, {PROVENANCE.get(one.provenance, 'of no known kind')}",
            *([f"convention: {one.convention}"] if one.convention else []),
            f"measured: {one.board}" if one.board else missing,
            *([f"tolerance: {one.tolerance:g} either way"] if one.tolerance is not None else []),
        ]
        made.append(Table(f"published beside measured: {one.title}", columns, tuple(rows), tuple(notes)))
    return made


def figure(value: float | None) -> str:
    """Show a published or measured score in at most two decimals."""
    return numbers.NONE if value is None else f"{value:.2f}".rstrip("0").rstrip(".")
