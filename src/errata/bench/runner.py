"""Edit, observe, take back: by case, by group or in a sequence. The unedited side is observed once for all."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from errata import config as settings
from errata.bench.schedule import SINGLE, Schedule
from errata.edits.edit import Edit, versions
from errata.edits.weight import WeightEdit
from errata.errors import ConfigError, DataError
from errata.evaluation import score
from errata.evaluation.metrics import perplexity
from errata.evaluation.observe import logprobs, observe, unique
from errata.host.load import Host
from errata.locate.contexts import sampled_corpus
from errata.methods import REGISTRY
from errata.registry import unknown
from errata.types import Case, Observation, Probe, Request, Row

if TYPE_CHECKING:  # methods are reached through the registry only
    from errata.methods._method import Method, Workspace

Tick = Callable[[str, int, int], None]

TEXTS = 200
"""Texts of a corpus that perplexity is measured on."""
SAMPLED, SAMPLED_TOKENS = 48, 128
"""How many texts a host without a corpus writes for that, and their length."""


@dataclass(frozen=True)
class Checkpoint:
    """One look at a host that has several edits in place."""

    edits: int
    """How many: in a sequence all so far, in a batch those of one group."""
    summary: Mapping[str, Mapping[str, Any]]
    """Averages over the cases of these edits, as in :class:`Report`."""
    perplexity_before: float
    """Per token of neutral text, without any edit."""
    perplexity_after: float
    """The same with the edits in place; infinite where the host's numbers overflow."""
    last_batch_efficacy: float | None
    """Share of the requests fitted last that free generation answers with the target: what was learned,
    before later edits can undo it. None where efficacy was not asked."""
    fit_seconds: float
    """Time spent on fits since the run began."""
    norm: float | None
    """Frobenius norm of all that stands on the weights."""
    digest: str | None
    """Identity of the edit that stands for them all."""


@dataclass(frozen=True)
class Report:
    """What an evaluation found: averages, every row, and what it took."""

    summary: Mapping[str, Mapping[str, Any]]
    """``{"<kind>.<protocol>": {"before", "after", "n", "ci"}}``; of a sequence, at its end."""
    rows: Sequence[Row]
    """Every row; of a sequence, those of all checkpoints, each with its number of edits in the detail."""
    meta: Mapping[str, Any]
    """Times, memory, versions, seed, host and method."""
    checkpoints: Sequence[Checkpoint] = ()
    """Looks at a host with several edits in place, in order; none where cases are edited one by one."""

    def to_dict(self) -> dict[str, Any]:
        """Return one JSON-ready document.

        ``{"summary", "rows", "meta"}``, and ``"checkpoints"`` where there are any: a list of ``{"edits",
        "summary", "perplexity_before", "perplexity_after", "last_batch_efficacy", "fit_seconds", "norm",
        "digest"}``, see :class:`Checkpoint`. In the rows of a sequence, ``detail["checkpoint"]`` is the
        checkpoint's ``edits``. JSON has no name for numbers that are not finite: they become the texts
        ``"inf"``, ``"-inf"`` and ``"nan"``, which ``float`` reads.
        """
        document: dict[str, Any] = {
            "summary": {name: dict(entry) for name, entry in self.summary.items()},
            "rows": [asdict(row) for row in self.rows],
            "meta": dict(self.meta),
        }
        if self.checkpoints:
            document["checkpoints"] = [asdict(point) for point in self.checkpoints]
        return _finite(document)


def evaluate(
    host: Host,
    cases: Sequence[Case],
    *,
    method: str | None = None,
    edit: Edit | None = None,
    work: Workspace,
    options: Mapping[str, Any] | None = None,
    schedule: Schedule = SINGLE,
    at: str | Sequence[int] | None = None,
    probes: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    after: Edit | None = None,
    keep: Callable[[Report, Edit], None] | None = None,
    tick: Tick = lambda what, done, total: None,
) -> Report:
    """Measure a method on a schedule, or one given edit on all cases.

    Exactly one of ``method`` and ``edit`` must be given. ``probes``: kinds to ask, None asks all. The
    host's weights are as before afterwards; ``meta["weights_restored"]`` says whether their bytes were
    found so.

    Several edits at once: ``texts`` are what perplexity is measured on, None takes text that the host or
    the workspace's corpus gives. Of a sequence: ``at`` says after how many edits to look
    (:meth:`Schedule.checkpoints`), ``after`` is the edit of its first cases to go on from, ``keep`` is
    handed the report so far and the edit at every checkpoint. Raises ConfigError for what does not belong
    together.
    """
    if (method is None) == (edit is None):
        raise ConfigError("evaluate takes either a method or an edit")
    if not cases:
        raise ConfigError("evaluate needs at least one case")
    if schedule.kind != "sequential" and any(given is not None for given in (at, after, keep)):
        raise ConfigError(
            f"checkpoints, and edits to keep or go on from, belong to sequential:N, not {schedule}"
        )
    if edit is not None and schedule != SINGLE:
        raise ConfigError(f"a given edit is measured as it is, without a schedule; found {schedule}")
    entry = _method(method, schedule) if method else None
    marks = schedule.checkpoints(len(cases), at) if schedule.kind == "sequential" else ()
    start = 0 if after is None or entry is None else _resumed(after, entry, cases, schedule, work.seed)
    run = _Run(
        host, _asked(cases, probes), work, schedule, dict(options or {}), tick,
        method=entry, edit=edit, after=after,
    )  # fmt: skip
    start_hash = host.weights_hash()
    looks = run.looks(marks, start)
    run.observe_before(texts)
    rows: list[Row] = []
    points: list[Checkpoint] = []
    for look in looks:
        rows += look.rows
        points += look.points
        if keep is not None and look.edit is not None:
            keep(run.report(rows, points, restored=None), look.edit)
    return run.report(rows, points, restored=host.weights_hash() == start_hash)


def held_out(host: Host, work: Workspace) -> list[str]:
    """Return running text for perplexity: the end of the workspace's corpus, else text the host writes.

    Statistics are taken from a corpus's beginning and from samples of another seed, so the text is not
    theirs unless a corpus is shorter than their budget.
    """
    corpus = work.corpus or sampled_corpus(host, seed=work.seed + 1, texts=SAMPLED, length=SAMPLED_TOKENS)
    return list(deque(corpus.texts(), maxlen=TEXTS))


def _method(name: str, schedule: Schedule) -> Method:
    """Look a method up. Raises ConfigError where it cannot follow the schedule."""
    method = REGISTRY.get(name)
    if schedule.kind == "batch" and schedule.size > 1 and not method.batch:
        raise ConfigError(
            f"{name} takes one request at a time, so it has no {schedule}; use single or sequential:{schedule.size}"
        )
    if schedule.kind == "sequential" and not method.sequential:
        raise ConfigError(
            f"{name} does not go on from an earlier edit, so it has no {schedule}; use "
            + ("single or batch:N" if method.batch else "single")
        )
    return method


def _asked(cases: Sequence[Case], kinds: Sequence[str] | None) -> Sequence[Case]:
    """Leave only probes of some kinds. Raises ConfigError for kinds that no case has."""
    if kinds is None:
        return cases
    known = sorted({probe.kind for case in cases for probe in case.probes})
    wrong = [kind for kind in kinds if kind not in known]
    if wrong or not kinds:
        raise ConfigError("; ".join(unknown(kind, known, "kind of probe") for kind in wrong or [""]))
    return [replace(case, probes=tuple(p for p in case.probes if p.kind in kinds)) for case in cases]


def _resumed(after: Edit, method: Method, cases: Sequence[Case], schedule: Schedule, seed: int) -> int:
    """Return how many cases an edit stands for. Raises ConfigError unless it is this run's beginning."""
    if after.provenance.method != method.name:
        raise ConfigError(f"cannot go on with {method.name} from an edit made by {after.provenance.method}")
    requests = after.provenance.requests
    for i, request in enumerate(requests):
        wanted = cases[i].request if i < len(cases) else None
        if request != wanted:
            raise ConfigError(
                f"cannot go on: request {i + 1} of the edit is {request}, of the cases {wanted}; "
                "give the cases that the edit was made from, in their order"
            )
    if len(requests) % schedule.size and len(requests) < len(cases):
        raise ConfigError(
            f"cannot go on: the edit stands for {len(requests)} requests, {schedule} stops after every "
            f"{schedule.size}; go on with the schedule it was made with"
        )
    if after.provenance.seed != seed:
        raise ConfigError(f"cannot go on: the edit was made with seed {after.provenance.seed}, found {seed}")
    return len(requests)


@dataclass(frozen=True)
class _Look:
    """What one look at the host found."""

    rows: list[Row]
    points: tuple[Checkpoint, ...] = ()
    edit: Edit | None = None
    """Where it can be gone on from: the edit that was in place."""


@dataclass
class _Run:
    """One evaluation: what it is about, what it knows of the unedited host, and what it took so far."""

    host: Host
    cases: Sequence[Case]
    work: Workspace
    schedule: Schedule
    options: dict[str, Any]
    tick: Tick
    method: Method | None = None
    edit: Edit | None = None
    """Given to be measured as it is."""
    after: Edit | None = None
    """Stands for a sequence's first cases."""
    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)
    fit_seconds: float = 0.0
    observe_seconds: float = 0.0
    fitted: int = 0
    """Cases fitted so far."""
    looked: int = 0
    """Cases observed so far, each as often as it was."""
    before: dict[Probe, Observation] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    text_tokens: int = 0
    perplexity_before: float = math.nan

    def looks(self, marks: Sequence[int], start: int) -> Iterator[_Look]:
        """Check the settings, then return the schedule's looks, each made when it is asked for."""
        if self.edit is not None:
            return self._given(self.edit)
        assert self.method is not None
        config = settings.make(self.method.config, self.options, self.method.name)
        if self.schedule.kind == "single":
            return self._single(self.method, config)
        if self.schedule.kind == "batch":
            return self._batches(self.method, config)
        return self._sequence(self.method, config, marks, start)

    def observe_before(self, texts: Sequence[str] | None) -> None:
        """Ask every probe once without an edit, and measure neutral text if edits come together."""
        probes = unique(p for case in self.cases for p in case.probes)
        seen = observe(self.host, probes, on_progress=lambda done, total: self.tick("before", done, total))
        self.before = dict(zip(probes, seen, strict=True))
        if self.schedule.kind == "single":
            return
        self.texts = list(texts) if texts is not None else held_out(self.host, self.work)
        found = logprobs(self.host, self.texts)
        self.text_tokens = sum(map(len, found))
        if not self.text_tokens:
            raise DataError(
                f"no text to measure perplexity on: {len(self.texts)} texts without a second token; "
                "give a longer corpus"
            )
        self.perplexity_before = perplexity.of_texts(found)

    def _given(self, edit: Edit) -> Iterator[_Look]:
        with edit.on(self.host):
            rows = self._rows(self.cases, "after")
        yield _Look([row for one in rows for row in one])

    def _single(self, method: Method, config: Any) -> Iterator[_Look]:
        for i, case in enumerate(self.cases):
            with self._timed(1):
                edit = method.fit(self.host, [case.request], config, self.work)
            with edit.on(self.host):
                rows = self._rows([case])
            self.tick("cases", i + 1, len(self.cases))
            yield _Look(rows[0])

    def _batches(self, method: Method, config: Any) -> Iterator[_Look]:
        for group in self.schedule.groups(len(self.cases)):
            cases = [self.cases[i] for i in group]
            with self._timed(len(group)):
                edit = method.fit(self.host, [case.request for case in cases], config, self.work)
            look = self._look(cases, edit, len(group))
            self.tick("cases", group.stop, len(self.cases))
            yield look

    def _sequence(self, method: Method, config: Any, marks: Sequence[int], start: int) -> Iterator[_Look]:
        edit = self.after
        for group in self.schedule.groups(len(self.cases), start):
            with self._timed(len(group)):
                edit = self._extended(method, config, [self.cases[i].request for i in group], edit)
            self.tick("edits", group.stop, len(self.cases))
            if group.stop in marks:
                yield self._look(self.cases[: group.stop], edit, len(group), sequence=True)
        if start == len(self.cases) and edit is not None:
            newest = start % self.schedule.size or self.schedule.size
            yield self._look(self.cases, edit, newest, sequence=True)

    def _extended(self, method: Method, config: Any, requests: Sequence[Request], edit: Any) -> Edit:
        """Fit requests on top of an edit, in one fit where the method takes several."""
        for some in [requests] if method.batch else [[request] for request in requests]:
            edit = method.run(self.host, some, config, self.work, after=edit)
        return edit

    @contextmanager
    def _timed(self, count: int) -> Iterator[None]:
        """Count the time inside as that of fitting so many cases."""
        at = time.perf_counter()
        yield
        self.fit_seconds += time.perf_counter() - at
        self.fitted += count

    def _look(self, cases: Sequence[Case], edit: Edit, newest: int, *, sequence: bool = False) -> _Look:
        """Observe cases and neutral text with their edit in place; ``newest``: how many were fitted last."""
        label = f"after {len(cases)} edits" if sequence else None
        with edit.on(self.host):
            rows = self._rows(cases, label, checkpoint=len(cases) if sequence else None)
            at = time.perf_counter()
            said = logprobs(self.host, self.texts)
            self.observe_seconds += time.perf_counter() - at
        table = [row for one in rows for row in one]
        learned = [
            row.after
            for one in rows[-newest:]
            for row in one
            if row.kind == "efficacy" and row.protocol == "generate"
        ]
        point = Checkpoint(
            edits=len(cases),
            summary=score.summarise(table, seed=self.work.seed),
            perplexity_before=self.perplexity_before,
            perplexity_after=perplexity.of_texts(said),
            last_batch_efficacy=sum(learned) / len(learned) if learned else None,
            fit_seconds=self.fit_seconds,
            norm=edit.norm() if isinstance(edit, WeightEdit) else None,
            digest=edit.digest if isinstance(edit, WeightEdit) else None,
        )
        return _Look(table, (point,), edit)

    def _rows(
        self, cases: Sequence[Case], label: str | None = None, checkpoint: int | None = None
    ) -> list[list[Row]]:
        """Ask each different probe of some cases once; return each case's rows."""
        at = time.perf_counter()
        probes = unique(p for case in cases for p in case.probes)

        def progress(done: int, total: int) -> None:
            if label is not None:
                self.tick(label, done, total)

        seen = dict(zip(probes, observe(self.host, probes, on_progress=progress), strict=True))
        self.observe_seconds += time.perf_counter() - at
        self.looked += len(cases)
        return [
            score.rows(
                case,
                [self.before[p] for p in case.probes],
                [seen[p] for p in case.probes],
                checkpoint=checkpoint,
            )
            for case in cases
        ]

    def report(self, rows: list[Row], points: list[Checkpoint], *, restored: bool | None) -> Report:
        """Put together what was found so far; ``restored`` None: the run is not over."""
        sequence = self.schedule.kind == "sequential"
        summary = points[-1].summary if sequence else score.summarise(rows, seed=self.work.seed)
        made_by = self.edit.provenance.method if self.edit else self.method and self.method.name
        meta: dict[str, Any] = {
            "cases": len(self.cases),
            "method": made_by,
            "schedule": "given edit" if self.edit else str(self.schedule),
            "options": self.options,
            "seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
            "fit_seconds_per_case": self.fit_seconds / max(1, self.fitted),
            "observe_seconds_per_case": self.observe_seconds / max(1, self.looked),
            "peak_memory_mb": _peak_memory_mb(),
            "versions": versions(),
            "seed": self.work.seed,
            "host": self.host.name,
            "host_fingerprint": self.host.fingerprint,
            "weights_restored": restored,
            "rome_scores": score.rome_scores(summary),
        }
        if self.schedule.kind != "single":
            meta["perplexity_of"] = {"texts": len(self.texts), "tokens": self.text_tokens}
        if sequence:
            meta["finished"] = restored is not None
            meta["after"] = None
            if self.after is not None:
                digest = self.after.digest if isinstance(self.after, WeightEdit) else None
                meta["after"] = {"digest": digest, "edits": len(self.after.provenance.requests)}
        return Report(summary, list(rows), meta, tuple(points))


def _finite(value: Any) -> Any:
    """Replace numbers that JSON cannot write by their names."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)
