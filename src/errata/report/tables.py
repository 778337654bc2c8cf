"""Tables of plain text, for the terminal and the card: one set per board, protocols never mixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.evaluation.metrics import Column, PaperScore, headline_metric
from errata.evaluation.metrics.intervals import mean
from errata.evaluation.metrics.summary import paper_scores
from errata.report import kinds, numbers
from errata.report.board import EARLIER, Board, Entry, absent, model_name
from errata.report.curves import Curves
from errata.report.languages import matrices_of
from errata.report.published import PROVENANCE, Comparison
from errata.report.read import Run, number


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """The tables of one board."""

    title: str
    tag: str
    tables: tuple[Table, ...]


def tag_line(tag: Mapping[str, Any]) -> str:
    """Format a protocol tag on one line; the dataset with the beginning of its hash."""
    parts = dict(tag)
    dataset, sha = parts.pop("dataset", None), parts.pop("dataset_sha256", None)
    words = [] if dataset is None else [f"{dataset}@{str(sha)[:12]}" if sha else str(dataset)]
    words += [f"{name}={value}" for name, value in parts.items() if value is not None]
    return " · ".join(words) or "no tag"


def sections(boards: Sequence[Board], *, brief: bool = False) -> list[Section]:
    """Build every board's tables. ``brief``: only the main ones, with short intervals, for a terminal."""
    result = []
    for board in boards:
        tables: list[Table | None] = [_main(board, brief), _further(board, brief), _languages(board)]
        if not brief:
            tables.append(_strict_shares(board))
            tables += [_protocol(board, protocol) for protocol in board.others()]
            tables += [_scores(board), _checkpoints(board), _cost(board)]
        tables.append(_retention(board, brief))
        present = tuple(table for table in tables if table is not None)
        result.append(Section(board.title, tag_line(board.tag), present))
    return result


def _names(board: Board) -> list[str]:
    return [f"{e.cell.name}{seed_of(e, board)}" + (" *" if e.cell.baseline else "") for e in board.entries]


def seed_of(entry: Entry, board: Board) -> str:
    """Return the suffix with a cell's seed, if its board has several seeds."""
    seeds = {e.cell.plan.get("seed") for e in board.entries}
    return f" (seed {entry.cell.plan.get('seed')})" if len(seeds) > 1 else ""


def _heading(kind: str, board: Board, *, short: bool = False) -> str:
    return kinds.label(kind, short=short) + (" kept" if kind in board.preserved else "")


def _main(board: Board, brief: bool) -> Table:
    main = [kind for kind in board.kinds if kinds.is_main(kind)]
    rest = {
        **{score.heading: [score_of(e, score.name) for e in board.entries] for score in board_scores()},
        **{metric.heading: [numbers.value(e.extra(metric), metric.name) for e in board.entries]
           for metric in board.extras()},
        "perplexity" if brief else "perplexity, before -> after": [_perplexity(e, brief) for e in board.entries],
        "time per edit": [numbers.seconds(fit_median(e)) for e in board.entries],
    }  # fmt: skip
    extra = {k: v for k, v in rest.items() if any(cell != numbers.NONE for cell in v)}
    earlier = [EARLIER] if board.earlier_headline else []
    rows = [
        (
            name,
            numbers.share(e.headline, brief=brief),
            *([numbers.share(e.earlier_headline, brief=brief)] if earlier else []),
            *(numbers.share(e.main_measure(kind), brief=brief) for kind in main),
            *(column[i] for column in extra.values()),
        )
        for i, (name, e) in enumerate(zip(_names(board), board.entries, strict=True))
    ]
    heads = [_heading(kind, board, short=brief) for kind in main]
    columns = ("method", "headline", *earlier, *heads, *extra)
    notes = [
        "; ".join(filter(None, (board.headline_text, board.earlier_text))),
        "per cent, with 95 % bootstrap intervals over cases; for kinds that must not change, the share still right "
        "among those right before",
        "* baseline: " + "; ".join(f"{e.cell.name} is {e.role}"
                                   for e in board.entries if e.cell.baseline),
    ]  # fmt: skip
    baseline = any(e.cell.baseline for e in board.entries)
    every_note = [*(notes if baseline else notes[:2]), *refused_cases(board)]
    return Table("free generation", columns, tuple(rows), tuple(every_note))


def refused_cases(board: Board) -> list[str]:
    """List methods that could not edit some cases; all shares include those cases with the unedited answers."""
    notes = []
    for entry in board.entries:
        refused = entry.cell.result.get("refused_cases") or []
        if refused:
            what = "1 case, which counts" if len(refused) == 1 else f"{len(refused)} cases, which count"
            first = f"{refused[0]['case']}: {refused[0]['reason']}"
            notes.append(f"{entry.cell.name} could not edit {what} as unedited; the first: {first}")
    return notes


def _further(board: Board, brief: bool) -> Table | None:
    other_kinds = [kind for kind in board.kinds if not kinds.is_main(kind)]
    tuned = any(e.over_tuning for e in board.entries)
    if not other_kinds and not tuned:
        return None
    rows = [
        (
            name,
            *([numbers.share(e.over_tuning, signed=True)] if tuned else []),
            *(numbers.share(e.main_measure(kind), brief=brief) for kind in other_kinds),
        )
        for name, e in zip(_names(board), board.entries, strict=True)
    ]
    columns = ("method", *(["over fine-tuning"] if tuned else []), *(_heading(k, board) for k in other_kinds))
    note = "over fine-tuning: difference of headlines in points, paired over cases"
    return Table("free generation, other kinds of probes", columns, tuple(rows), (note,) if tuned else ())


def _languages(board: Board) -> Table | None:
    """Return a line for each method, language edited in and language asked in; None where there is one language."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry, name in zip(board.entries, _names(board), strict=True):
        for kind, matrix in matrices_of(entry.cell).items():
            for edited, asked in matrix.items():
                for language, found in asked.items():
                    lines.setdefault((name, edited, language), {})[kind] = numbers.percent(found["after"])
    columns = kinds.order({kind for line in lines.values() for kind in line}, board.preserved)
    headings = tuple(_heading(kind, board) for kind in columns)
    rows = tuple((*key, *(line.get(kind, numbers.NONE) for kind in columns)) for key, line in lines.items())
    title = "free generation, by language"
    return Table(title, ("method", "edited in", "asked in", *headings), rows) if rows else None


def strict_shares(board: Board) -> list[tuple[str, str, str]]:
    """List the further shares of free generation for the main kinds: heading, kind and name in the summary."""
    return [
        (f"{kinds.label(kind)}, {column.heading}", kind, column.number)
        for kind in board.kinds if kinds.is_main(kind)
        for column in headline_metric().columns
        if column.heading and column.kinds in ("all", "kept" if kind in board.preserved else "changing")
        and any((m := e.main_measure(kind)) is not None and column.number in m.more for e in board.entries)
    ]  # fmt: skip


def _strict_shares(board: Board) -> Table | None:
    columns_of = strict_shares(board)
    rows = []
    for name, e in zip(_names(board), board.entries, strict=True):
        shares = [m.more.get(more) if (m := e.main_measure(kind)) else None for _, kind, more in columns_of]
        rows.append((name, *map(numbers.percent, shares)))
    note = "; ".join(f"{c.heading}: {c.note}" for c in headline_metric().columns if c.note)
    columns = ("method", *(heading for heading, _, _ in columns_of))
    return Table("free generation, stricter shares", columns, tuple(rows), (note,)) if columns_of else None


def _protocol(board: Board, protocol: str) -> Table | None:
    """Build a protocol's own table: its value by kind, then the further columns of its metric."""
    probe_kinds = {kind for e in board.entries for kind in e.measures.get(protocol, {})}
    kinds_shown = kinds.order(probe_kinds, board.preserved)
    further = [
        (kind, column)
        for kind in kinds_shown
        for column in numbers.metric(protocol).columns
        if column.heading and any(_number(e, protocol, kind, column) is not None for e in board.entries)
    ]
    show = numbers.percent if numbers.is_share(protocol) else numbers.plain
    rows = [
        (
            name,
            *(numbers.quantity(e.measure(protocol, kind), protocol) for kind in kinds_shown),
            *(show(_number(e, protocol, kind, column)) for kind, column in further),
        )
        for name, e in zip(_names(board), board.entries, strict=True)
    ]
    heads = (f"{_heading(kind, board)}, {column.heading}" for kind, column in further)
    columns = ("method", *(_heading(kind, board) for kind in kinds_shown), *heads)
    notes = dict.fromkeys(f"{column.heading}: {column.note}" for _, column in further if column.note)
    return Table(protocol_title(protocol), columns, tuple(rows), tuple(notes)) if kinds_shown else None


def _number(entry: Entry, protocol: str, kind: str, column: Column) -> float | None:
    measure = entry.measure(protocol, kind)
    return measure.more.get(column.number) if measure else None


def protocol_title(protocol: str) -> str:
    """Return the heading of a protocol, with its judge if there is one."""
    _, mark, judge = protocol.partition(" by ")
    return numbers.metric(protocol).title + mark.replace(" by ", ", by ") + judge


def score_of(entry: Entry, name: str) -> str:
    """Format a legacy score, which is in per cent."""
    value = number((entry.cell.result.get("scores") or {}).get(name))
    return numbers.NONE if value is None else f"{value:.1f}"


def scores_of(board: Board) -> list[str]:
    """List the legacy scores of a board's cells, by the papers' names."""
    names_measured = (name for e in board.entries for name, v in (e.cell.result.get("scores") or {}).items()
                if number(v) is not None)  # fmt: skip
    lead = sorted((score for score in paper_scores() if score.lead), key=lambda score: score.lead)
    first = [score.name for score in lead]
    names = list(dict.fromkeys(names_measured))
    return [n for n in first if n in names] + [n for n in names if n not in first]


def board_scores() -> list[PaperScore]:
    """List the legacy scores with a column in the first table."""
    return [score for score in paper_scores() if score.heading]


def _scores(board: Board) -> Table | None:
    names = scores_of(board)
    if not names:
        return None
    rows = [
        (name, *(score_of(e, score) for score in names))
        for name, e in zip(_names(board), board.entries, strict=True)
    ]
    title = "legacy scores under the papers' names, only for comparison with papers"
    return Table(title, ("method", *names), tuple(rows))


def _with_curves(board: Board) -> list[tuple[str, Curves]]:
    pairs = zip(_names(board), board.entries, strict=True)
    return [(name, entry.curves) for name, entry in pairs if entry.curves is not None]


def _checkpoints(board: Board) -> Table | None:
    rows = [
        (
            name, f"{checkpoint.edits:,}", numbers.share(checkpoint.efficacy), numbers.percent(checkpoint.newest),
            f"{numbers.plain(checkpoint.perplexity_before)} -> {numbers.plain(checkpoint.perplexity)}",
            numbers.plain(checkpoint.norm_ratio), "; ".join(checkpoint.alarms),
        )
        for name, c in _with_curves(board) for checkpoint in c.checkpoints
    ]  # fmt: skip
    columns = ("method", "edits", "efficacy", "newest", "perplexity", "norm ratio", "alarm")
    note = "efficacy: all edits so far; newest: the last ones; norm ratio: largest |change| / |weight|"
    return Table("as edits accumulate", columns, tuple(rows), (note,)) if rows else None


def _retention(board: Board, brief: bool) -> Table | None:
    curves_of = _with_curves(board)
    ages = sorted({(a.first, a.last) for _, c in curves_of for a in c.retention})
    if not ages:
        return None
    rows = []
    for name, c in curves_of:
        success_at = {(a.first, a.last): a.success for a in c.retention}
        rows.append((name, *(numbers.share(success_at.get(age), brief=brief) for age in ages)))
    heads = tuple(f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in ages)
    note = "age: number of later edits; per cent, free generation"
    return Table(
        "still answered with the target, by age of the edit", ("method", *heads), tuple(rows), (note,)
    )


def fit_median(entry: Entry) -> float | None:
    """Return the median seconds of a fit; None where nothing was fitted."""
    cost = entry.cell.result.get("cost") or {}
    return number((cost.get("fit") or {}).get("median"))


def perplexities(entry: Entry) -> tuple[float | None, float | None]:
    """Return the perplexity of neutral text before and after: at the end of a sequence, or averaged over batches."""
    records = entry.cell.checkpoints[-1:] if entry.cell.sequence else entry.cell.checkpoints
    before = [v for record in records if (v := number(record.get("perplexity_before"))) is not None]
    after = [v for record in records if (v := number(record.get("perplexity_after"))) is not None]
    return mean(before), mean(after)


def _perplexity(entry: Entry, brief: bool) -> str:
    before, after = perplexities(entry)
    if brief:
        return numbers.plain(after)
    return numbers.NONE if after is None else f"{numbers.plain(before)} -> {numbers.plain(after)}"


def cost_of(entry: Entry) -> dict[str, str]:
    """Format a cell's costs by name, without those that were not measured."""
    cost = entry.cell.result.get("cost") or {}
    fit, observe, overhead = (cost.get(name) or {} for name in ("fit", "observe", "latency_overhead"))
    memory = number(cost.get("peak_memory_mb"))
    has_fit = fit_median(entry) is not None
    texts = {
        "set-up time": numbers.seconds(number(cost.get("setup_seconds"))),
        "fit, median": numbers.seconds(fit_median(entry)),
        "fit, 95th percentile": numbers.seconds(number(fit.get("p95"))),
        "fit, total": numbers.seconds(number(fit.get("total")) if has_fit else None),
        "evaluation per case": numbers.seconds(number(observe.get("per_case"))),
        "peak memory": numbers.size(None if memory is None else memory * 2**20),
        "size of an edit": numbers.size(number(cost.get("bytes_per_edit"))),
        "prefill overhead": _slower(overhead.get("prefill")),
        "decode overhead": _slower(overhead.get("decode")),
    }
    restored = entry.cell.result.get("weights_restored")
    if restored is not None:
        texts["weights"] = "restored" if restored else "NOT RESTORED"
    return {name: text for name, text in texts.items() if text != numbers.NONE}


def _slower(value: Any) -> str:
    overhead = number(value)
    return numbers.NONE if overhead is None else f"{100 * overhead:.0f} %"


def _cost(board: Board) -> Table | None:
    costs = [cost_of(e) for e in board.entries]
    names = list(dict.fromkeys(name for one in costs for name in one))
    rows = [
        (name, *(one.get(column, numbers.NONE) for column in names))
        for name, one in zip(_names(board), costs, strict=True)
    ]
    return Table("cost", ("method", *names), tuple(rows)) if names else None


def absent_table(runs: Sequence[Run]) -> Table | None:
    """List cells without results, with the reason; None where every cell has results."""
    rows = []
    for cell in absent(runs):
        plan = cell.plan
        missing = "no result file yet" if cell.status == "unfinished" else "no rows"
        reason = reason_of(cell.reason) or missing
        if cell.status == "unfinished" and cell.cases:
            reason = f"{cell.cases} cases so far"
        rows.append((
            cell.name, model_name(cell), str(plan.get("dataset", "")), str(plan.get("schedule", "")),
            cell.status, reason,
        ))  # fmt: skip
    columns = ("method", "model", "dataset", "schedule", "status", "reason")
    return Table("cells without results", columns, tuple(rows)) if rows else None


def reason_of(reason: str) -> str:
    """Return the short form of a reason: the last line of a traceback."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def published_tables(comparisons: Sequence[Comparison], *, brief: bool = False) -> list[Table]:
    """Build a table of every comparison; figures from memory are never shown.

    ``brief``: only measured lines, possibly none.
    """
    columns = ("method", "score", "published", "provenance", "measured", "difference", "tolerance")
    result = []
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
            f"provenance: {one.provenance}, {PROVENANCE.get(one.provenance, 'unknown')}",
            *([f"convention: {one.convention}"] if one.convention else []),
            f"measured: {one.board}" if one.board else missing,
            *([f"tolerance: {one.tolerance:g} either way"] if one.tolerance is not None else []),
        ]
        result.append(Table(f"published and measured: {one.title}", columns, tuple(rows), tuple(notes)))
    return result


def figure(value: float | None) -> str:
    """Format a published or measured score with at most two decimals."""
    return numbers.NONE if value is None else f"{value:.2f}".rstrip("0").rstrip(".")
