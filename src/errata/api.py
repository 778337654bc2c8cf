"""The Python interface in a few verbs: load, prepare, edit, check, evaluate. Thin on purpose."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from errata.bench.evaluate import Report
from errata.bench.evaluate import evaluate as run
from errata.bench.schedule import Schedule
from errata.edits import Edit
from errata.edits.artefact import Artefact
from errata.errors import ConfigError
from errata.evaluation.check import EditCheck, answer_requests, compare_answers
from errata.host.host import Host
from errata.host.kinds import check_asked
from errata.inspect.facts import fact
from errata.inspect.tracing import DEFAULT as TRACE
from errata.inspect.tracing import Settings as TraceSettings
from errata.inspect.tracing import Trace
from errata.inspect.tracing import trace as run_trace
from errata.job import AnyRequest
from errata.job import prepare as prepare
from errata.job import prepare_training as prepare_training
from errata.loading import load as load
from errata.methods import DEFAULT
from errata.progress import OnProgress, ignore
from errata.training.loop import NO_FILES, TrainingFiles
from errata.training.workers import ALONE, Workers
from errata.types import DEFAULT_ASK, AskOptions, Case, Corpus, Request
from errata.types.asking import THOUGHT_TOKENS


def edit(
    host: Host, requests: AnyRequest | Sequence[AnyRequest], *,
    method: str = DEFAULT, seed: int = 0, after: Edit | None = None, batch_size: int | str = "auto",
    corpus: str | os.PathLike[str] | Corpus | None = None, examples: str | Sequence[Case] | None = None,
    template: str | None = None, system: str | None = None, thinking: bool | str | None = None,
    join: str | None = None, on_progress: OnProgress = ignore, **options: Any,
) -> Edit:  # fmt: skip
    """Fit an edit for some requests and return it; the host is left as it was.

    ``options`` are the method's settings, see ``errata methods NAME``. ``after``: an edit of the same method to
    continue from; the result includes it, and is the same whether or not the earlier one was saved and loaded in
    between. ``batch_size``: how many requests to run at once; auto takes what suits the device. Either way batches
    shrink when memory runs out.

    ``template``, ``system``, ``thinking``, ``join``: how prompts are formatted and joined with their targets, see
    :class:`errata.host.prompts.PromptFormat`; recorded in the edit. Left out, they are those of ``after``, else
    the host's own (``raw``).

    ``corpus``: a text file for statistics. ``examples``: other facts with paraphrases and neighbours, for methods
    that need them (``ike``): cases, or a source as for ``errata eval --cases``. Left out, both are the host's own
    (``host.resources``); a host without a corpus writes one.

    The same as ``errata.prepare(...).run()``. Raises ConfigError for unknown methods or settings and for a method of
    another kind of model, RequestError for requests the host cannot take.
    """
    ask = AskOptions(template, system, thinking, join)
    return prepare(
        host, requests, method=method, options=options, seed=seed, after=after, batch_size=batch_size,
        corpus=corpus, examples=examples, ask=ask, on_progress=on_progress,
    ).run()  # fmt: skip


def train(
    host: Host, *, method: str, cases: str | Sequence[Case] | None = None, seed: int = 0, quick: bool = False,
    files: TrainingFiles = NO_FILES, workers: Workers = ALONE, on_progress: OnProgress = ignore, **options: Any,
) -> Artefact:  # fmt: skip
    """Train a method's editor on a host and return it; the host is left as it was.

    ``cases``: facts with paraphrases and neighbours, or a source as for ``errata eval --cases``; None: the host's own
    examples. ``quick``, ``files``, ``workers``: see :func:`errata.job.prepare_training`. ``options`` are the method's
    settings. Save the result, and edit with ``editor=PATH``. Raises ConfigError
    for a method that learns no editor.
    """
    return prepare_training(
        host,
        method=method,
        options=options,
        seed=seed,
        cases=cases,
        quick=quick,
        files=files,
        workers=workers,
        on_progress=on_progress,
    ).run()


def trace(
    host: Host, prompt: str, subject: str, *, answer: str | None = None, settings: TraceSettings = TRACE
) -> Trace:  # fmt: skip
    """Trace which states of a model bring a prompt's answer back when its subject is unreadable; see
    :mod:`errata.inspect.tracing`.

    ``answer``: None for the host's own first choice; its first token is read. The host is left as it was. Raises
    RequestError for a subject that is not in the prompt, HostError for a host that is no causal language model.
    """
    return run_trace(host, fact(host, prompt, subject, answer), settings)


def check_edit(
    host: Host, edit: Edit, *, foreign: bool = False, options: AskOptions = DEFAULT_ASK,
    on_progress: OnProgress = ignore,
) -> EditCheck:  # fmt: skip
    """Check which requests of an edit are answered with their target: by free generation, without and with it.

    The host is left as it was. ``options``: how prompts are
    formatted. Raises ConfigError for an edit of images, HostError for a text-to-image pipeline, EditError as
    :meth:`Edit.apply_` does.
    """
    check_asked(host.name, host.kind, "a check of answers")
    requests = [request for request in edit.provenance.requests if isinstance(request, Request)]
    if len(requests) != len(edit.provenance.requests):
        raise ConfigError(
            "requests of images are not kept in an edit; compare host.labels(images) with the edit on"
        )

    def answers(phase: str) -> list[str]:
        return answer_requests(
            host,
            requests,
            options=options,
            on_progress=lambda completed, total: on_progress(phase, completed, total),
        )

    before = answers("asking before")
    with edit.on(host, foreign=foreign):
        after = answers("asking after")
    return compare_answers(requests, before, after)


def evaluate(
    host: Host, cases: Sequence[Case], *, method: str | None = None,
    edit: Edit | Sequence[Edit] | None = None, seed: int = 0,
    schedule: str | Schedule = "single", at: str | Sequence[int] | None = None,
    probes: Sequence[str] | None = None, after: Edit | None = None,
    keep: Callable[[Report, Edit], None] | None = None, template: str | None = None, max_new_tokens: int = 24,
    system: str | None = None, thinking: bool | str | None = None, join: str | None = None,
    thinking_template: str | None = None, thought_tokens: int = THOUGHT_TOKENS,
    corpus: str | os.PathLike[str] | Corpus | None = None, examples: str | Sequence[Case] | None = None,
    run_folder: str | os.PathLike[str] | None = None, on_progress: OnProgress = ignore, **options: Any,
) -> Report:  # fmt: skip
    """Evaluate a method on cases, or given edits on all of them. The host is left as it was.

    With ``edit``, that edit, or all of several together, is in place for all cases. With ``method`` and its
    ``options``, cases are edited on a ``schedule``: ``single``, one case at a time, undone after each; ``batch:N``, N
    cases per fit, undone; ``sequential:N``, N cases per fit, edits accumulate, evaluated after ``at`` edits (numbers,
    ``each``, ``every:N``, ``decades``, ``end``; default 10, 50, 100, 200, 500 ... and the end) together with the
    perplexity of neutral text. ``after``: the edit of a sequence's first cases, to continue from; ``keep`` is called
    with the report so far and the edit at each of its checkpoints. ``probes``: kinds to ask, default all.

    ``template``: how prompts are formatted: ``raw``, ``question`` (an answer cue behind questions), ``chat`` (the
    tokenizer's template) or ``auto``; with it ``system``, ``thinking`` and ``join``, see :func:`edit`. Requests are
    edited in the format that probes are asked in, and a given edit is asked in its own unless another is given.
    ``thinking`` may also be ``forced``, and ``thinking_template`` give a block where no template has one: see
    :class:`errata.types.AskOptions`. ``max_new_tokens``, ``thought_tokens``: longest short answer, longest thoughts.
    ``corpus``, ``examples``: see :func:`edit`.

    An evaluation is a benchmark run of one cell. ``run_folder``: a folder to save it in, as ``errata report`` reads
    it; default: a temporary one. A folder of the same evaluation is continued after its last saved case, or
    checkpoint of a sequence; one that is finished is only read, without calls of ``keep``. Times in ``meta`` are those
    of this call. Raises ConfigError for arguments that exclude each other and for a folder of another evaluation.

    Cases of the lab for edits that are in place together: ``lab.cases(n, together=True)``.
    """
    return run(
        host, cases, method=method, edit=edit, options=options, seed=seed,
        schedule=Schedule.parse(schedule) if isinstance(schedule, str) else schedule, at=at, probes=probes,
        after=after, keep=keep, corpus=corpus, examples=examples, run_folder=run_folder, on_progress=on_progress,
        ask=AskOptions(
            template, system, thinking, join, max_new_tokens, thought_tokens, thinking_template=thinking_template
        ),
    )  # fmt: skip
