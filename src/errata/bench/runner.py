"""Case by case: edit, observe, take back. The unedited side is observed once for all cases."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from errata import config as settings
from errata.edits.edit import Edit, versions
from errata.errors import ConfigError
from errata.evaluation import score
from errata.evaluation.observe import observe, unique
from errata.host.load import Host
from errata.methods import REGISTRY
from errata.types import Case, Observation, Probe, Row

if TYPE_CHECKING:  # methods are reached through the registry only
    from errata.methods._method import Workspace

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Report:
    """What an evaluation found: averages, every row, and what it took."""

    summary: Mapping[str, Mapping[str, Any]]
    """``{"<kind>.<protocol>": {"before", "after", "n", "ci"}}``."""
    rows: Sequence[Row]
    meta: Mapping[str, Any]
    """Times, memory, versions, seed, host and method."""

    def to_dict(self) -> dict[str, Any]:
        """Return one JSON-ready document."""
        return {
            "summary": {name: dict(entry) for name, entry in self.summary.items()},
            "rows": [asdict(row) for row in self.rows],
            "meta": dict(self.meta),
        }


def evaluate(
    host: Host,
    cases: Sequence[Case],
    *,
    method: str | None = None,
    edit: Edit | None = None,
    work: Workspace,
    options: Mapping[str, Any] | None = None,
    tick: Tick = lambda what, done, total: None,
) -> Report:
    """Measure a method, fitted anew for every case, or one given edit on all cases.

    Exactly one of ``method`` and ``edit`` must be given. The host's weights are as before afterwards;
    ``meta["weights_restored"]`` says whether their bytes were found so.
    """
    if (method is None) == (edit is None):
        raise ConfigError("evaluate takes either a method or an edit")
    if not cases:
        raise ConfigError("evaluate needs at least one case")
    wall, cpu = time.perf_counter(), time.process_time()
    start_hash = host.weights_hash()
    before = _before(host, cases, tick)
    cost = _Cost()
    after = _each(host, cases, method, work, options or {}, cost, tick) if method else (
        _together(host, cases, edit, cost, tick) if edit else []
    )  # fmt: skip
    table = [
        row
        for case, new in zip(cases, after, strict=True)
        for row in score.rows(case, [before[p] for p in case.probes], new)
    ]
    summary = score.summarise(table, seed=work.seed)
    meta = {
        "cases": len(cases),
        "method": method or (edit.provenance.method if edit else None),
        "schedule": "single" if method else "given edit",
        "options": dict(options or {}),
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "fit_seconds_per_case": cost.fit / len(cases),
        "observe_seconds_per_case": cost.observe / len(cases),
        "peak_memory_mb": _peak_memory_mb(),
        "versions": versions(),
        "seed": work.seed,
        "host": host.name,
        "host_fingerprint": host.fingerprint,
        "weights_restored": host.weights_hash() == start_hash,
        "rome_scores": score.rome_scores(summary),
    }
    return Report(summary, table, meta)


@dataclass
class _Cost:
    fit: float = 0.0
    observe: float = 0.0


def _before(host: Host, cases: Sequence[Case], tick: Tick) -> dict[Probe, Observation]:
    probes = unique(p for case in cases for p in case.probes)
    seen = observe(host, probes, on_progress=lambda done, total: tick("before", done, total))
    return dict(zip(probes, seen, strict=True))


def _each(
    host: Host,
    cases: Sequence[Case],
    name: str,
    work: Workspace,
    options: Mapping[str, Any],
    cost: _Cost,
    tick: Tick,
) -> list[list[Observation]]:
    method = REGISTRY.get(name)
    config = settings.make(method.config, options, name)
    after = []
    for i, case in enumerate(cases):
        at = time.perf_counter()
        edit = method.fit(host, [case.request], config, work)
        cost.fit += time.perf_counter() - at
        after.append(_observed(host, case, edit.on(host), cost))
        tick("cases", i + 1, len(cases))
    return after


def _together(
    host: Host, cases: Sequence[Case], edit: Edit, cost: _Cost, tick: Tick
) -> list[list[Observation]]:
    after = []
    with edit.on(host):
        for i, case in enumerate(cases):
            after.append(_observed(host, case, nullcontext(), cost))
            tick("cases", i + 1, len(cases))
    return after


def _observed(host: Host, case: Case, state: AbstractContextManager[Any], cost: _Cost) -> list[Observation]:
    at = time.perf_counter()
    with state:
        seen = observe(host, case.probes)
    cost.observe += time.perf_counter() - at
    return seen


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
