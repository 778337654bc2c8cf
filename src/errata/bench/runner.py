"""Edit, observe, take back: by case, by group or in a sequence. The unedited side is observed once for all."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from errata import config as settings
from errata.bench import machine
from errata.bench.results import finite
from errata.bench.schedule import SINGLE, Schedule
from errata.edits import group as groups
from errata.edits.edit import Edit, versions
from errata.edits.group import EditGroup
from errata.errors import ConfigError, DataError, RequestError
from errata.evaluation import score
from errata.evaluation.metrics import perplexity, retention
from errata.evaluation.observe import check as check_probes
from errata.evaluation.observe import logprobs, observe, unique
from errata.host.load import Host
from errata.host.prompts import PromptFormat
from errata.locate.contexts import sampled_corpus
from errata.methods import REGISTRY
from errata.registry import unknown
from errata.types import Case, Observation, Row

if TYPE_CHECKING:  # methods are reached through the registry only
    from errata.methods._method import Method, Workspace

Tick = Callable[[str, int, int], None]

TEXTS = 200
"""Texts of a corpus that perplexity is measured on."""
SAMPLED, SAMPLED_TOKENS = 48, 128
"""How many texts a host without a corpus writes for that, and their length."""
OPEN_TOKENS = 64
"""Length of what is continued from an open prompt."""
CHUNK = 32
"""Cases asked together: what batches are made of, so never a matter of where a run was stopped."""


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
        return finite(document)


def evaluate(
    host: Host,
    cases: Sequence[Case],
    *,
    method: str | None = None,
    edit: Edit | Sequence[Edit] | None = None,
    work: Workspace,
    options: Mapping[str, Any] | None = None,
    schedule: Schedule = SINGLE,
    at: str | Sequence[int] | None = None,
    probes: Sequence[str] | None = None,
    texts: Sequence[str] | None = None,
    after: Edit | None = None,
    keep: Callable[[Report, Edit], None] | None = None,
    asking: Mapping[str, Any] | None = None,
    tick: Tick = lambda what, done, total: None,
) -> Report:
    """Measure a method on a schedule, or given edits, all in place together, on all cases.

    Exactly one of ``method`` and ``edit`` must be given. ``probes``: kinds to ask, None asks all. The
    host's weights are as before afterwards; ``meta["weights_restored"]`` says whether their bytes were
    found so.

    Several edits at once: ``texts`` are what perplexity is measured on, None takes text that the host or
    the workspace's corpus gives. Of a sequence: ``at`` says after how many edits to look
    (:meth:`Schedule.checkpoints`), ``after`` is the edit of its first cases to go on from, ``keep`` is
    handed the report so far and the edit at every checkpoint. ``asking``: options of
    :func:`errata.evaluation.observe.observe`. Raises ConfigError for what does not belong together.
    """
    given = groups.group(edit)
    if (method is None) == (given is None):
        raise ConfigError("evaluate takes either a method or an edit")
    if not cases:
        raise ConfigError("evaluate needs at least one case")
    if schedule.kind != "sequential" and any(option is not None for option in (at, after, keep)):
        raise ConfigError(
            f"checkpoints, and edits to keep or go on from, belong to sequential:N, not {schedule}"
        )
    if given is not None and schedule != SINGLE:
        raise ConfigError(f"a given edit is measured as it is, without a schedule; found {schedule}")
    entry = check_method(method, schedule) if method else None
    marks = schedule.checkpoints(len(cases), at) if schedule.kind == "sequential" else ()
    start = 0 if after is None or entry is None else resumed(after, entry, cases, schedule, work.seed)
    config = settings.make(entry.config, options or {}, entry.name) if entry else None
    evaluation = _Evaluation(
        Engine(
            host, _asked(cases, probes), work, schedule, before=lambda case: (), method=entry,
            config=config, edit=given, asking=dict(asking or {}), tick=tick,
        ), dict(options or {}), after,
    )  # fmt: skip
    score.check_packages(evaluation.engine.cases)
    check_probes(host, evaluation.engine.cases, **evaluation.engine.asking)
    start_hash = host.weights_hash()
    evaluation.observe_before(texts)
    with closing(evaluation.engine.events(marks, start, after)) as events:
        for event in events:
            evaluation.add(event, keep)
    return evaluation.report(restored=host.weights_hash() == start_hash)


def held_out(host: Host, work: Workspace) -> list[str]:
    """Return running text for perplexity: the end of the workspace's corpus, else text the host writes.

    Statistics are taken from a corpus's beginning and from samples of another seed, so the text is not
    theirs unless a corpus is shorter than their budget.
    """
    corpus = work.corpus or sampled_corpus(host, seed=work.seed + 1, texts=SAMPLED, length=SAMPLED_TOKENS)
    return list(deque(corpus.texts(), maxlen=TEXTS))


def check_method(name: str, schedule: Schedule) -> Method:
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


def resumed(after: Edit, method: Method, cases: Sequence[Case], schedule: Schedule, seed: int) -> int:
    """Return how many cases an edit stands for. Raises ConfigError unless it is this run's beginning."""
    if after.provenance.method != method.name:
        raise ConfigError(f"cannot go on with {method.name} from an edit made by {after.provenance.method}")
    requests = after.provenance.requests
    asked = [request for case in cases for request in case.requests]
    for i, request in enumerate(requests):
        wanted = asked[i] if i < len(asked) else None
        if request != wanted:
            raise ConfigError(
                f"cannot go on: request {i + 1} of the edit is {request}, of the cases {wanted}; "
                "give the cases that the edit was made from, in their order"
            )
    ends = [0, *itertools.accumulate(len(case.requests) for case in cases)]
    done = ends.index(len(requests)) if len(requests) in ends else None
    if done is None or (done % schedule.size and done < len(cases)):
        raise ConfigError(
            f"cannot go on: the edit stands for {len(requests)} requests, {schedule} stops after every "
            f"{schedule.size}; go on with the schedule it was made with"
        )
    if after.provenance.seed != seed:
        raise ConfigError(f"cannot go on: the edit was made with seed {after.provenance.seed}, found {seed}")
    return done


@dataclass(frozen=True)
class Seen:
    """One case, as it was observed with an edit in place."""

    case: Case
    rows: list[Row]
    edits: int | None
    """How many edits of a sequence were in place; None where the schedule is none."""
    fit_seconds: float | None
    """Its share of the time its group's fit took; None where it was fitted in an earlier run."""
    observe_seconds: float
    """Its share of the time its chunk's observation took."""
    edit: Edit | None
    """What was in place; None where nothing could be."""
    refused: str | None = None
    """Why the case could not be fitted; its rows are then those of the unedited host."""


@dataclass(frozen=True)
class Look:
    """A look at a host with several edits in place, after its cases were seen."""

    edits: int
    newest: int
    """How many cases were fitted last."""
    said: list[Tensor]
    """Log-probabilities of the neutral texts, see :func:`errata.evaluation.observe.logprobs`."""
    continued: list[str]
    """How the open prompts were continued."""
    last_batch_efficacy: float | None
    """See :class:`Checkpoint`."""
    edit: Edit

    @property
    def perplexity(self) -> float:
        """Perplexity per token of the neutral texts; infinite where the host's numbers overflow."""
        return perplexity.of_texts(self.said)


@dataclass
class Engine:
    """Fits cases on a schedule, or takes a given edit, and observes them: a stream of what was seen.

    The host is as before whenever the stream stands still after a :class:`Look`, or is closed.
    """

    host: Host
    cases: Sequence[Case]
    work: Workspace
    schedule: Schedule
    before: Callable[[Case], Sequence[Observation]]
    """What the unedited host says to a case's probes."""
    method: Method | None = None
    config: Any = None
    edit: EditGroup | None = None
    """Given to be measured as they are."""
    texts: Sequence[str] = ()
    """Neutral texts, read at every look."""
    prompts: Sequence[str] = ()
    """Beginnings of running text, continued at every look."""
    asking: Mapping[str, Any] = field(default_factory=dict)
    """Options of :func:`errata.evaluation.observe.observe`."""
    lenient: bool = False
    """Whether a case edited alone that cannot be fitted counts as unedited, rather than ending the stream."""
    tick: Tick = lambda what, done, total: None
    fit_seconds: float = 0.0
    observe_seconds: float = 0.0
    fitted: int = 0
    """Cases fitted so far."""
    looked: int = 0
    """Cases observed so far, each as often as it was."""
    fits: list[float | None] = field(default_factory=list)
    """Seconds by case; None for cases that were fitted in an earlier run."""

    def events(
        self,
        marks: Sequence[int] = (),
        start: int = 0,
        after: Edit | None = None,
        fits: Sequence[float | None] | None = None,
    ) -> Generator[Seen | Look, None, None]:
        """Yield every case as it is seen, and after those of a group or a mark the look at them all.

        ``marks``: after how many edits of a sequence to look. ``start``: how many cases are done already;
        of a sequence, ``after`` is the edit that stands for them. ``fits``: what fitting them took, if known.
        """
        self.fits = list(fits) if fits is not None else [None] * start
        if self.edit is not None:
            yield from self._seen(self.cases, self.edit, None, "after")
        elif self.schedule.kind == "single":
            yield from self._singles(start)
        elif self.schedule.kind == "batch":
            yield from self._batches(start)
        else:
            yield from self._sequence(marks, start, after)

    def _singles(self, start: int) -> Iterator[Seen]:
        for i in range(start, len(self.cases)):
            try:
                edit = self._fit(range(i, i + 1), None)
            except RequestError as error:
                if not self.lenient:
                    raise
                yield self._unfitted(self.cases[i], error)
            else:
                yield from self._seen([self.cases[i]], edit, None, first=i)
            self.tick("cases", i + 1, len(self.cases))

    def _unfitted(self, case: Case, error: RequestError) -> Seen:
        """See a case whose edit there is not: the host says what it said before."""
        self.fits.append(None)
        known = self.before(case)
        return Seen(case, score.rows(case, known, known), None, None, 0.0, None, str(error))

    def _batches(self, start: int) -> Iterator[Seen | Look]:
        for group in self.schedule.groups(len(self.cases), start):
            yield from self._looked(group, self._fit(group, None), len(group), None)
            self.tick("cases", group.stop, len(self.cases))

    def _sequence(self, marks: Sequence[int], start: int, after: Edit | None) -> Iterator[Seen | Look]:
        edit = after
        for group in self.schedule.groups(len(self.cases), start):
            edit = self._fit(group, edit)
            self.tick("edits", group.stop, len(self.cases))
            if group.stop in marks:
                yield from self._looked(range(group.stop), edit, len(group), group.stop)
        if start == len(self.cases) and edit is not None:
            newest = start % self.schedule.size or self.schedule.size
            yield from self._looked(range(start), edit, newest, start)

    def _fit(self, group: range, after: Any) -> Edit:
        """Fit some cases, alone or on top of an edit: in one fit where the method takes several requests."""
        assert self.method is not None
        requests = [request for i in group for request in self.cases[i].requests]
        at = time.perf_counter()
        edit: Any = after
        for some in [requests] if self.method.batch else [[request] for request in requests]:
            edit = self.method.run(self.host, some, self.config, self.work, after=edit)
        took = time.perf_counter() - at
        self.fit_seconds += took
        self.fitted += len(group)
        self.fits += [took / len(group)] * len(group)
        return edit

    def _looked(self, group: range, edit: Edit, newest: int, edits: int | None) -> Iterator[Seen | Look]:
        """See cases, then read the neutral texts with the same edit in place."""
        cases = [self.cases[i] for i in group]
        label = None if edits is None else f"after {edits} edits"
        newest_rows: list[Row] = []
        for place, seen in enumerate(self._seen(cases, edit, edits, label, first=group.start)):
            if place >= len(cases) - newest:
                newest_rows += seen.rows
            yield seen
        at = time.perf_counter()
        with edit.on(self.host):
            said, continued = self.health()
        self.observe_seconds += time.perf_counter() - at
        yield Look(len(cases), newest, said, continued, retention.recall_of(newest_rows), edit)

    def health(self) -> tuple[list[Tensor], list[str]]:
        """Read the neutral texts and continue the open prompts, with the host as it is now."""
        continued: Any = []
        if self.prompts:
            asked = list(self.prompts)
            plain = self.host.with_prompt_format(PromptFormat())
            continued = plain.generate(asked, max_new_tokens=OPEN_TOKENS, natural_stop=False)
        return logprobs(self.host, self.texts), continued

    def _seen(
        self,
        cases: Sequence[Case],
        edit: Edit | EditGroup,
        edits: int | None,
        label: str | None = None,
        first: int = 0,
    ) -> Iterator[Seen]:
        """Ask cases in chunks with an edit in place, and score them once it is off again."""
        for begin in range(0, len(cases), CHUNK):
            chunk = cases[begin : begin + CHUNK]
            probes = unique(probe for case in chunk for probe in case.probes)
            known = [self.before(case) for case in chunk]
            at = time.perf_counter()
            with edit.on(self.host):
                said = dict(zip(probes, observe(self.host, probes, **self.asking), strict=True))
            scored = [
                score.rows(case, old, [said[p] for p in case.probes], checkpoint=edits)
                for case, old in zip(chunk, known, strict=True)
            ]
            took = time.perf_counter() - at
            self.observe_seconds += took
            self.looked += len(chunk)
            if label is not None:
                self.tick(label, begin + len(chunk), len(cases))
            for i, (case, rows) in enumerate(zip(chunk, scored, strict=True)):
                place = first + begin + i
                fit = self.fits[place] if place < len(self.fits) else None
                yield Seen(
                    case, rows, edits, fit, took / len(chunk), edit if isinstance(edit, Edit) else None
                )


@dataclass
class _Evaluation:
    """One evaluation in memory: its engine, what it knows of the unedited host, and what it found so far."""

    engine: Engine
    options: dict[str, Any]
    after: Edit | None = None
    """Stands for a sequence's first cases."""
    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)
    rows: list[Row] = field(default_factory=list)
    points: list[Checkpoint] = field(default_factory=list)
    text_tokens: int = 0
    perplexity_before: float = math.nan
    _since: int = 0
    """Rows at the last look."""

    def observe_before(self, texts: Sequence[str] | None) -> None:
        """Ask every probe once without an edit, and measure neutral text if edits come together."""
        engine = self.engine
        probes = unique(p for case in engine.cases for p in case.probes)

        def ticked(done: int, total: int) -> None:
            engine.tick("before", done, total)

        seen = dict(
            zip(probes, observe(engine.host, probes, on_progress=ticked, **engine.asking), strict=True)
        )
        engine.before = lambda case: [seen[probe] for probe in case.probes]
        if engine.schedule.kind == "single":
            return
        engine.texts = list(texts) if texts is not None else held_out(engine.host, engine.work)
        found = logprobs(engine.host, engine.texts)
        self.text_tokens = counted(engine.texts, found)
        self.perplexity_before = perplexity.of_texts(found)

    def add(self, event: Seen | Look, keep: Callable[[Report, Edit], None] | None) -> None:
        """Take in what the engine saw; at a look, hand over what is found so far."""
        if isinstance(event, Seen):
            self.rows += event.rows
            return
        edit, table = event.edit, self.rows[self._since :]
        self._since = len(self.rows)
        self.points.append(
            Checkpoint(
                edits=event.edits,
                summary=score.summarise(table, seed=self.engine.work.seed),
                perplexity_before=self.perplexity_before,
                perplexity_after=event.perplexity,
                last_batch_efficacy=event.last_batch_efficacy,
                fit_seconds=self.engine.fit_seconds,
                norm=edit.summary().get("norm"),
                digest=edit.digest,
            )
        )
        if keep is not None:
            keep(self.report(restored=None), edit)

    def report(self, *, restored: bool | None) -> Report:
        """Put together what was found so far; ``restored`` None: the run is not over."""
        engine = self.engine
        sequence = engine.schedule.kind == "sequential"
        summary = self.points[-1].summary if sequence else score.summarise(self.rows, seed=engine.work.seed)
        made_by = engine.edit.method if engine.edit else engine.method and engine.method.name
        meta: dict[str, Any] = {
            "cases": len(engine.cases),
            "method": made_by,
            "schedule": given_edits(engine.edit) if engine.edit else str(engine.schedule),
            "options": self.options,
            "asking": dict(engine.asking),
            "seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
            "fit_seconds_per_case": engine.fit_seconds / max(1, engine.fitted),
            "observe_seconds_per_case": engine.observe_seconds / max(1, engine.looked),
            "peak_memory_mb": machine.peak_memory_mb(),
            "versions": versions(),
            "seed": engine.work.seed,
            "host": engine.host.name,
            "host_fingerprint": engine.host.fingerprint,
            "weights_restored": restored,
            "rome_scores": score.rome_scores(summary),
        }
        if engine.schedule.kind != "single":
            meta["perplexity_of"] = {"texts": len(engine.texts), "tokens": self.text_tokens}
        if sequence:
            meta["finished"] = restored is not None
            meta["after"] = None
            if self.after is not None:
                digest = self.after.digest if self.after is not None else None
                meta["after"] = {"digest": digest, "edits": len(self.after.provenance.requests)}
        return Report(summary, list(self.rows), meta, tuple(self.points))


def given_edits(edits: EditGroup) -> str:
    """Word what is measured where there is no schedule."""
    return "given edit" if len(edits.edits) == 1 else f"{len(edits.edits)} given edits"


def counted(texts: Sequence[str], said: Sequence[Tensor]) -> int:
    """Count the tokens that perplexity is measured on. Raises DataError where there are none."""
    tokens = sum(map(len, said))
    if not tokens:
        raise DataError(
            f"no text to measure perplexity on: {len(texts)} texts without a second token; "
            "give a longer corpus"
        )
    return tokens
