"""The summary of a cell: averages, scores, retention and cost, from the rows in its folder."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from errata.bench import health
from errata.bench.plan import Cell
from errata.bench.results import CELL, Journal, finite, row_of
from errata.bench.worker_state import WorkerState
from errata.edits.edit import Edit
from errata.evaluation import score
from errata.evaluation.metrics import retention
from errata.host.host import Host
from errata.types import Row

__all__ = ["CELL", "document", "measured", "unfinished"]

DECODE = "greedy"
MATCHER = "an accepted answer as whole words in the first answer, the old one not asserted"
LOCALITY = "right before, still right after"


@dataclass
class _CellRows:
    """The contents of a cell's rows."""

    rows: list[Row] = field(default_factory=list)
    """Rows to average: for a sequence, those at its end."""
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    recalls: list[retention.EditRecall] = field(default_factory=list)
    fits: list[float] = field(default_factory=list)
    observe_seconds: list[float] = field(default_factory=list)
    """Seconds for observing, by case and checkpoint."""
    bytes: list[int] = field(default_factory=list)
    refusals: list[dict[str, str]] = field(default_factory=list)


def document(worker: WorkerState, cell: Cell, journal: Journal, measured: dict[str, Any]) -> dict[str, Any]:
    """Return the summary of a finished cell, the content of ``cell.json``."""
    contents = _read(journal, cell)
    summary = score.summarise(contents.rows, seed=cell.seed)
    ripple = {f"Ripple.{name}": value for name, value in score.ripple_scores(contents.rows).items()}
    host = worker.host(cell)
    return finite({
        "id": cell.id,
        "cell": asdict(cell),
        "tag": tag(worker, cell),
        "status": "done",
        "reason": None,
        "summary": summary,
        "looks": contents.checkpoints,
        "scores": score.legacy_scores(summary) | ripple,
        "retention": _retention(contents) if cell.look else None,
        "cost": {**_cost(contents, cell), **measured},
        "host": {"name": host.name, "fingerprint": host.fingerprint},
        "weights_restored": True,
        "refused_cases": contents.refusals,
    })  # fmt: skip


def unfinished(cell: Cell, status: str, reason: str, restored: bool | None) -> dict[str, Any]:
    """Return the document of a cell that was refused or failed, with the reason."""
    empty = ("tag", "summary", "looks", "scores", "retention", "cost", "host")
    return {
        "id": cell.id,
        "cell": asdict(cell),
        "status": status,
        "reason": reason,
        **dict.fromkeys(empty),
        "weights_restored": restored,
        "refused_cases": [],
    }


def tag(worker: WorkerState, cell: Cell) -> dict[str, Any]:
    """Return the protocol of a cell: the settings that must be equal for two numbers to be comparable."""
    facts = worker.plan.datasets[cell.dataset]
    check = facts["check"] if isinstance(facts["check"], dict) else {}
    cases, size = len(worker.cases(cell)), cell.plan.size
    return {
        "dataset": cell.dataset,
        "dataset_sha256": facts["sha256"],
        "convention": check.get("variant") or None,
        "prompt_template": worker.ask(cell).template,
        "decode": DECODE,
        "matcher": MATCHER,
        "locality_mode": LOCALITY,
        "edits": cases if cell.plan.kind == "sequential" else min(size, cases),
        "batch": min(size, cases),
        "max_new_tokens": worker.ask(cell).max_new_tokens,
        "dtype": str(worker.host(cell).dtype).removeprefix("torch."),
    }


def measured(host: Host, edit: Edit | None, prompts: Sequence[str]) -> dict[str, Any]:
    """Measure peak memory, and by how much an edit slows down the host, while it is open."""
    overhead: dict[str, float | None] = {"prefill": None, "decode": None}
    if edit is not None and prompts:
        overhead = health.latency_overhead(host, edit, prompts[0])
    return {"peak_memory_mb": health.peak_mb(host), "latency_overhead": overhead}


def _read(journal: Journal, cell: Cell) -> _CellRows:
    contents = _CellRows()
    last = cell.look[-1] if cell.look else None
    place = 0
    for record in journal.records():
        if record["type"] == "look":
            contents.checkpoints.append({name: value for name, value in record.items() if name != "type"})
            place = 0
            continue
        place += 1
        if "refused" in record:
            contents.refusals.append({"case": record["case"], "reason": record["refused"]})
        cost, rows = record["cost"], [row_of(row) for row in record["rows"]]
        contents.observe_seconds.append(cost["observe_seconds"])
        if record["edits"] is not None:
            contents.recalls += _recalls(rows, place, record["edits"])
        if record["edits"] == last:
            contents.rows += rows
            contents.fits += [] if cost["fit_seconds"] is None else [cost["fit_seconds"]]
            contents.bytes += [] if cost.get("bytes") is None else [cost["bytes"]]
    return contents


def _recalls(rows: Sequence[Row], place: int, edits: int) -> list[retention.EditRecall]:
    """Return the recall of one case's edit; nothing if efficacy was not measured."""
    share = retention.recall_of(rows)
    return [] if share is None else [retention.EditRecall(place, edits, share)]


def _retention(contents: _CellRows) -> dict[str, Any] | None:
    """Return success by age and by number of edits in place; None if efficacy was not measured."""
    if not contents.recalls:
        return None
    past = retention.mean_by_count(contents.recalls)
    looks = [
        retention.Health(
            look["edits"],
            past.get(look["edits"]),
            float(look["perplexity_after"]) / float(look["perplexity_before"]),
            look["collapse"]["after"]["repetition"],
        )
        for look in contents.checkpoints
    ]
    return {
        "by_age": [asdict(stratum) for stratum in retention.strata(contents.recalls)],
        "by_edits": [{"edits": edits, "right": right} for edits, right in past.items()],
        "area": retention.area(past.items()),
        "collapse_point": retention.collapse_point(looks, limits=_limits(contents.checkpoints)),
    }


def _limits(looks: Sequence[dict[str, Any]]) -> Any:
    """Return the limits of the signs of collapse, relative to the unedited host; None without a checkpoint."""
    before = looks[0]["collapse"]["before"] if looks else None
    return before and health.limits(before["repetition"], before["evenness"])


def _cost(contents: _CellRows, cell: Cell) -> dict[str, Any]:
    """Sum up times and sizes; the set-up is what the first fit took beyond the median."""
    fits = contents.fits
    group = cell.plan.size if cell.plan.kind != "single" else 1
    setup = max(0.0, fits[0] - statistics.median(fits)) * group if len(fits) > 2 * group else None
    sizes = [size / group for size in contents.bytes]
    last = contents.checkpoints[-1] if contents.checkpoints else None
    if cell.plan.kind == "sequential" and last and last["bytes"] is not None:
        sizes = [last["bytes"] / last["edits"]]
    seconds = sum(contents.observe_seconds)
    return {
        "setup_seconds": setup,
        "fit": health.times(fits),
        "observe": {"total": seconds, "per_case": seconds / max(1, len(contents.observe_seconds))},
        "bytes_per_edit": statistics.median(sizes) if sizes else None,
    }
