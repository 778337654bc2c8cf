"""Edit, evaluate, revert: per case, per group or in a sequence. The unedited host is observed only once."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from errata.bench.schedule import Schedule
from errata.edits.edit import Edit
from errata.edits.group import EditGroup
from errata.errors import ConfigError, DataError, RequestError
from errata.evaluation import score
from errata.evaluation.metrics import perplexity, retention
from errata.evaluation.observe import logprobs, observe, text_routes, unique
from errata.host.host import Host
from errata.host.kinds import CAUSAL, KINDS, check_asked
from errata.host.prompts import PromptFormat
from errata.host.routed import Routes
from errata.job import Job
from errata.locate.contexts import sampled_corpus
from errata.progress import OnProgress, ignore
from errata.registry import unknown
from errata.types import DEFAULT_ASK, AskOptions, Case, Observation, Row

if TYPE_CHECKING:  # methods are reached through the registry only
    from errata.methods._method import Method, Workspace


TEXTS = 200
"""Number of texts from a corpus on which perplexity is measured."""
SAMPLED, SAMPLED_TOKENS = 48, 128
"""Number of texts sampled from a host without a corpus instead, and their length in tokens."""
OPEN_TOKENS = 64
"""Number of tokens generated after an open prompt."""
CHUNK = 32
"""Number of cases observed together. It determines the batches, so chunks are the same in a resumed run."""


def held_out(host: Host, work: Workspace) -> list[str]:
    """Return running text for perplexity: the end of the workspace's corpus, else text sampled from the host.

    Statistics use the beginning of the corpus, or samples of another seed, so the texts are different unless the
    corpus is shorter than the token budget.
    """
    corpus = work.corpus or sampled_corpus(
        host, seed=work.seed + 1, texts=SAMPLED, length=SAMPLED_TOKENS, folder=work.folder_of(host)
    )
    return list(deque(corpus.texts(), maxlen=TEXTS))


def neutral_texts(host: Host, work: Workspace) -> list[str]:
    """Return running text for perplexity: the host's own neutral texts, else :func:`held_out` ones."""
    own = host.resources.neutral_texts
    return held_out(host, work) if own is None else list(own(TEXTS))


def check_schedule(method: Method, schedule: Schedule, host: Host) -> None:
    """Raise ConfigError if a method, or the kind of host, does not support the schedule."""
    name = method.name
    check_asked(host.name, host.kind, "a benchmark")
    if schedule.kind != "single" and host.kind != CAUSAL:
        raise ConfigError(
            f"a host with several edits is measured on running text too, which {KINDS[host.kind].plural} do not score; "
            "use single"
        )
    if schedule.kind == "batch" and schedule.size > 1 and not method.batch:
        raise ConfigError(
            f"{name} takes one request at a time, so it has no {schedule}; use single or sequential:{schedule.size}"
        )
    if schedule.kind == "sequential" and not method.sequential:
        raise ConfigError(
            f"{name} cannot continue from an earlier edit, so it does not support {schedule}; use "
            + ("single or batch:N" if method.batch else "single")
        )


def with_probes(cases: Sequence[Case], kinds: Sequence[str] | None) -> Sequence[Case]:
    """Return the cases with only the probes of some kinds. Raises ConfigError for kinds that no case has."""
    if kinds is None:
        return cases
    kinds_present = sorted({probe.kind for case in cases for probe in case.probes})
    unknown_kinds = [kind for kind in kinds if kind not in kinds_present]
    if unknown_kinds or not kinds:
        raise ConfigError(
            "; ".join(unknown(kind, kinds_present, "kind of probe") for kind in unknown_kinds or [""])
        )
    return [replace(case, probes=tuple(p for p in case.probes if p.kind in kinds)) for case in cases]


def count_edited_cases(after: Edit, cases: Sequence[Case], schedule: Schedule, seed: int) -> int:
    """Return the number of cases an edit covers. Raises ConfigError unless they are the first ones, in their order."""
    requests = after.provenance.requests
    expected = [request for case in cases for request in case.requests]
    for i, request in enumerate(requests):
        other = expected[i] if i < len(expected) else None
        if request != other:
            raise ConfigError(
                f"cannot continue: request {i + 1} of the edit is {request}, that of the cases is {other}; "
                "give the cases that the edit was made from, in the same order"
            )
    ends = [0, *itertools.accumulate(len(case.requests) for case in cases)]
    count = ends.index(len(requests)) if len(requests) in ends else None
    if count is None or (count % schedule.size and count < len(cases)):
        raise ConfigError(
            f"cannot continue: the edit contains {len(requests)} requests, {schedule} stops after every "
            f"{schedule.size}; use the schedule it was made with"
        )
    if after.provenance.seed != seed:
        raise ConfigError(
            f"cannot continue: the edit was made with seed {after.provenance.seed}, found {seed}"
        )
    return count


@dataclass(frozen=True)
class EvaluatedCase:
    """One case, evaluated with an edit in place."""

    case: Case
    rows: list[Row]
    edits: int | None
    """Number of edits of a sequence in place; None for other schedules."""
    fit_seconds: float | None
    """Its share of the time for fitting its group; None if it was fitted in an earlier run."""
    observe_seconds: float
    """Its share of the time for observing its chunk."""
    edit: Edit | None
    """The edit in place; None if the case could not be fitted."""
    refused: str | None = None
    """Why the case could not be fitted; its rows are then those of the unedited host."""


@dataclass(frozen=True)
class CheckpointResult:
    """A host evaluated with several edits in place, after their cases."""

    edits: int
    newest: int
    """Number of cases in the most recent fit."""
    logprobs: list[Tensor]
    """Log-probabilities of the neutral texts, see :func:`errata.evaluation.observe.logprobs`."""
    continued: list[str]
    """The generated continuations of the open prompts."""
    last_batch_efficacy: float | None
    """See :class:`Checkpoint`."""
    edit: Edit
    routes: list[Routes]
    """Of each neutral text, the experts of its tokens; empty for a model without stacked experts."""

    @property
    def perplexity(self) -> float:
        """Perplexity per token of the neutral texts; infinite where the host's numbers overflow."""
        return perplexity.of_texts(self.logprobs)


@dataclass
class Engine:
    """Fits cases on a schedule, or uses given edits, and yields the evaluation results.

    The host is restored whenever the generator pauses after a :class:`CheckpointResult`, or is closed.
    """

    host: Host
    cases: Sequence[Case]
    schedule: Schedule
    before: Callable[[Case], Sequence[Observation]]
    """Returns the unedited host's observations for a case's probes."""
    job: Job | None = None
    """Fits the cases' requests; None if edits are given."""
    edit: EditGroup | None = None
    """Given edits to evaluate."""
    texts: Sequence[str] = ()
    """Neutral texts, scored at every checkpoint."""
    prompts: Sequence[str] = ()
    """Beginnings of running text, continued at every checkpoint."""
    ask: AskOptions = DEFAULT_ASK
    """Options for prompts and generation."""
    lenient: bool = False
    """Whether a single case that cannot be fitted counts as unedited instead of raising an error."""
    tick: OnProgress = ignore
    fit_seconds: float = 0.0
    observe_seconds: float = 0.0
    fits: list[float | None] = field(default_factory=list)
    """Seconds by case; None for cases that were fitted in an earlier run."""

    def events(
        self,
        marks: Sequence[int] = (),
        start: int = 0,
        after: Edit | None = None,
        fits: Sequence[float | None] | None = None,
    ) -> Generator[EvaluatedCase | CheckpointResult, None, None]:
        """Yield every evaluated case, and after the cases of a batch or a checkpoint its CheckpointResult.

        ``marks``: in a sequence, the numbers of edits after which to evaluate. ``start``: number of cases evaluated
        earlier; in a sequence, ``after`` is the edit of those. ``fits``: seconds for fitting each of them, if known.
        """
        self.fits = list(fits) if fits is not None else [None] * start
        if self.edit is not None:
            first = start - start % CHUNK  # whole chunks: the last bits of the numbers depend on the batches
            results = self._evaluate(self.cases[first:], self.edit, None, "after", first)
            yield from itertools.islice(results, start - first, None)
        elif self.schedule.kind == "single":
            yield from self._singles(start)
        elif self.schedule.kind == "batch":
            yield from self._batches(start)
        else:
            yield from self._sequence(marks, start, after)

    def _singles(self, start: int) -> Iterator[EvaluatedCase]:
        for i in range(start, len(self.cases)):
            try:
                edit = self._fit(range(i, i + 1), None)
            except RequestError as error:
                if not self.lenient:
                    raise
                yield self._unedited_result(self.cases[i], error)
            else:
                yield from self._evaluate([self.cases[i]], edit, None, first=i)
            self.tick("cases", i + 1, len(self.cases))

    def _unedited_result(self, case: Case, error: RequestError) -> EvaluatedCase:
        """Return the result of a case that could not be fitted: that of the unedited host."""
        self.fits.append(None)
        observations = self.before(case)
        return EvaluatedCase(
            case, score.rows(case, observations, observations), None, None, 0.0, None, str(error)
        )

    def _batches(self, start: int) -> Iterator[EvaluatedCase | CheckpointResult]:
        for group in self.schedule.groups(len(self.cases), start):
            yield from self._evaluate_checkpoint(group, self._fit(group, None), len(group), None)
            self.tick("cases", group.stop, len(self.cases))

    def _sequence(
        self, marks: Sequence[int], start: int, after: Edit | None
    ) -> Iterator[EvaluatedCase | CheckpointResult]:
        edit = after
        for group in self.schedule.groups(len(self.cases), start):
            edit = self._fit(group, edit)
            self.tick("edits", group.stop, len(self.cases))
            if group.stop in marks:
                yield from self._evaluate_checkpoint(range(group.stop), edit, len(group), group.stop)
        if start == len(self.cases) and edit is not None:
            newest = start % self.schedule.size or self.schedule.size
            yield from self._evaluate_checkpoint(range(start), edit, newest, start)

    def _fit(self, group: range, after: Any) -> Edit:
        """Fit some cases, alone or on top of an edit: in one fit where the method takes several requests."""
        assert self.job is not None
        requests = [request for i in group for request in self.cases[i].requests]
        at = time.perf_counter()
        edit: Any = after
        for some in [requests] if self.job.method.batch else [[request] for request in requests]:
            edit = self.job.fit(some, after=edit)
        took = time.perf_counter() - at
        self.fit_seconds += took
        self.fits += [took / len(group)] * len(group)
        return edit

    def _evaluate_checkpoint(
        self, group: range, edit: Edit, newest: int, edits: int | None
    ) -> Iterator[EvaluatedCase | CheckpointResult]:
        """Evaluate cases, then score the neutral texts with the same edit in place."""
        cases = [self.cases[i] for i in group]
        label = None if edits is None else f"after {edits} edits"
        newest_rows: list[Row] = []
        for place, result in enumerate(self._evaluate(cases, edit, edits, label, first=group.start)):
            if place >= len(cases) - newest:
                newest_rows += result.rows
            yield result
        at = time.perf_counter()
        with edit.on(self.host):
            neutral_logprobs, continued = self.health()
            routes = text_routes(self.host, self.texts)
        self.observe_seconds += time.perf_counter() - at
        yield CheckpointResult(
            len(cases), newest, neutral_logprobs, continued, retention.recall_of(newest_rows), edit, routes
        )

    def health(self) -> tuple[list[Tensor], list[str]]:
        """Return the log-probabilities ``[tokens]`` of each neutral text, and continuations of the open prompts."""
        continued: Any = []
        if self.prompts:
            prompts = list(self.prompts)
            plain = self.host.with_prompt_format(PromptFormat())
            continued = plain.generate(prompts, max_new_tokens=OPEN_TOKENS, natural_stop=False)
        return logprobs(self.host, self.texts), continued

    def _evaluate(
        self,
        cases: Sequence[Case],
        edit: Edit | EditGroup,
        edits: int | None,
        label: str | None = None,
        first: int = 0,
    ) -> Iterator[EvaluatedCase]:
        """Observe the probes of cases in chunks with an edit in place, and score the answers after removing it."""
        for begin in range(0, len(cases), CHUNK):
            chunk = cases[begin : begin + CHUNK]
            probes = unique(probe for case in chunk for probe in case.probes)
            before = [self.before(case) for case in chunk]
            at = time.perf_counter()
            with edit.on(self.host):
                observations = dict(zip(probes, observe(self.host, probes, self.ask), strict=True))
            scored = [
                score.rows(case, old, [observations[p] for p in case.probes], checkpoint=edits)
                for case, old in zip(chunk, before, strict=True)
            ]
            took = time.perf_counter() - at
            self.observe_seconds += took
            if label is not None:
                self.tick(label, begin + len(chunk), len(cases))
            for i, (case, rows) in enumerate(zip(chunk, scored, strict=True)):
                place = first + begin + i
                fit = self.fits[place] if place < len(self.fits) else None
                yield EvaluatedCase(
                    case, rows, edits, fit, took / len(chunk), edit if isinstance(edit, Edit) else None
                )


def count_tokens(texts: Sequence[str], text_logprobs: Sequence[Tensor]) -> int:
    """Return the number of tokens on which perplexity is measured. Raises DataError if there are none.

    ``text_logprobs``: log-probabilities ``[tokens]`` of each text.
    """
    tokens = sum(map(len, text_logprobs))
    if not tokens:
        raise DataError(
            f"no text to measure perplexity on: none of {len(texts)} texts has two tokens; "
            "give a longer corpus"
        )
    return tokens
