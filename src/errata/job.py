"""Jobs: everything that a fit needs, validated once, for Python, the command line and benchmarks alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from errata import config as settings
from errata.bench import sources
from errata.edits import Edit
from errata.edits.artefact import Artefact
from errata.edits.edit import Provenance
from errata.errors import ConfigError, RequestError, shown
from errata.host.host import Host
from errata.host.images import ImageHost
from errata.host.kinds import check_asked, kind
from errata.host.prompts import prompt_format, recorded_format
from errata.host.text_to_image import TextToImageHost
from errata.methods import REGISTRY
from errata.methods._method import Method, Workspace, provenance
from errata.progress import OnProgress, ignore
from errata.stats.cache import cache_dir
from errata.stats.corpora import as_corpus
from errata.training.loop import NO_FILES, TrainingFiles
from errata.training.trackers import check_tracker
from errata.training.workers import ALONE, Workers
from errata.types import DEFAULT_ASK, AskOptions, Case, Concept, Contrasts, Corpus, ImageRequest, Request

AnyRequest: TypeAlias = Request | ImageRequest | Concept | Contrasts
"""What a method may be asked for: a fact, images, a concept to take out, or a behaviour to steer to."""
TRACE = "trace"
"""As a method's ``layers`` or ``layer``: the layer that causal tracing of the requests points at."""
EXAMPLE_SEED = 1_000_003
"""Seed that named sources of examples are drawn with; no measurement uses it."""


@dataclass(frozen=True)
class Job:
    """A fit that was validated: nothing of it is checked again, nothing is left open but how long it takes."""

    method: Method
    config: Any
    """The method's settings; what is None is chosen for the model when fitting."""
    host: Host
    """With the prompt format of the options."""
    requests: tuple[AnyRequest, ...]
    work: Workspace
    """Seed, corpus, examples and the cache of statistics."""
    after: Edit | None = None
    """The edit that the result continues from and includes."""

    def run(self) -> Edit:
        """Fit all requests and return the edit; the host is left as it was."""
        return self.fit(self.requests, self.after)

    def fit(self, requests: Sequence[AnyRequest], after: Edit | None = None) -> Edit:
        """Fit some requests with this job's method and settings, alone or continuing from an edit."""
        return self.method.run(self.host, requests, self.config, self.work, after=after)  # type: ignore[arg-type]

    @property
    def provenance(self) -> Provenance:
        """What the edit will be recorded to come from, but for settings that the fit chooses and its notes."""
        work = replace(self.work, after=self.after)
        return provenance(self.method.name, self.host, self.requests, self.config, work)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Return the job as plain data, requests counted."""
        return {
            "method": self.method.name,
            "settings": settings.plain(self.config),
            "model": self.host.name,
            "kind": self.host.kind,
            "prompt_format": self.host.prompt_format.to_dict(),
            "requests": len(self.requests),
            "seed": self.work.seed,
            "batch_size": self.work.batch_size or "auto",
            "corpus": None if self.work.corpus is None else self.work.corpus.name,
            "after": None if self.after is None else self.after.digest,
        }


def prepare(
    host: Host, requests: AnyRequest | Sequence[AnyRequest], *, method: str,
    options: Mapping[str, Any] | object | None = None, seed: int = 0, after: Edit | None = None,
    batch_size: int | str = "auto", corpus: str | os.PathLike[str] | Corpus | None = None,
    examples: str | Sequence[Case] | None = None, ask: AskOptions = DEFAULT_ASK,
    work: Workspace | None = None, beneath: Sequence[Edit] = (), check: bool = True,
    on_progress: OnProgress = ignore,
) -> Job:  # fmt: skip
    """Validate everything that a fit needs and return the job; nothing is fitted.

    ``options``: the method's settings by name, or an instance of its settings class; of these ``layers`` or ``layer``
    may be ``trace``, see :data:`TRACE`. ``after``, ``batch_size``, ``corpus``, ``examples``: as of :func:`errata.edit`.
    ``ask``: how prompts are formatted. ``work``: a workspace to share, in place of ``seed``, ``corpus`` and
    ``examples``. ``beneath``: edits in place on the host that are to stay there during the fit, while statistics are
    those of the host without them. ``check``: False leaves requests that the host cannot take to the fit, as benchmarks
    do, where such a case is counted and the others continue.

    Raises ConfigError for unknown methods or settings, for a method that edits other kinds of model and for an edit
    that cannot be continued, RequestError listing every request that the host cannot take, DataError for a corpus or
    examples that cannot be read.
    """
    entry = REGISTRY.get(method)
    config = options
    if not isinstance(config, entry.config):
        config = check_settings(entry, options or {})  # type: ignore[arg-type]
    check_kind(entry, host)
    entry.check_after(after)
    host = with_prompt_options(host, ask, after=after)
    requests = (
        (requests,) if isinstance(requests, (Request, ImageRequest, Concept, Contrasts)) else tuple(requests)
    )
    check_takes(entry, requests)
    check_pictures(entry, requests)
    if check:
        check_requests(host, requests)
    size = _batch_size(batch_size)
    if isinstance(options, Mapping) and TRACE in options.values():
        config = settings.make(entry.config, _traced(host, requests, options), method)
    if work is None:
        work = workspace(host, seed=seed, corpus=corpus, examples=examples, on_progress=on_progress)
        work.batch_size, work.beneath = size, tuple(beneath)
    return Job(entry, config, host, requests, work, after)


def check_settings(method: Method, options: Mapping[str, Any]) -> Any:
    """Return a method's settings, with layer 0 where one is still to be traced. Raises ConfigError for invalid ones."""
    return settings.make(method.config, _at_layer(options, 0), method.name)


def _at_layer(options: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Return the options with a layer in place of :data:`TRACE`; a tuple of one layer is read from one number."""
    given = {name: layer for name in ("layers", "layer") if options.get(name) == TRACE}
    return {**options, **given}


def _traced(host: Host, requests: Sequence[AnyRequest], options: Mapping[str, Any]) -> dict[str, Any]:
    """Trace the requests and return the options with the layer that it points at."""
    from errata.inspect.localisation import traced_layer

    check_asked(host.name, host.kind, "layers: trace")
    facts = [request for request in requests if isinstance(request, Request)]
    if len(facts) != len(requests):
        raise ConfigError("layers: trace needs requests about subjects in a text, which can be traced")
    return _at_layer(options, traced_layer(host, facts))


@dataclass(frozen=True)
class TrainingJob:
    """A validated training of a method's editor."""

    method: Method
    config: Any
    """Instance of the method's settings class."""
    host: Host
    work: Workspace
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the cases are, for the editor's card: source, hash, count, what was left out of them."""

    def run(self) -> Artefact:
        """Train the editor and record what on; the host is left as it was."""
        artefact = self.method.train_on(self.host, self.config, self.work)
        return replace(artefact, card={**artefact.card, "data": dict(self.data)}) if self.data else artefact

    def to_dict(self) -> dict[str, Any]:
        """Describe the job as plain data."""
        return {
            "method": self.method.name,
            "settings": settings.plain(self.config),
            "model": self.host.name,
            "examples": len(self.work.examples),
            "seed": self.work.seed,
        }


def prepare_training(
    host: Host, *, method: str, options: Mapping[str, Any] | object | None = None, seed: int = 0,
    cases: str | Sequence[Case] | None = None, quick: bool = False, files: TrainingFiles = NO_FILES,
    workers: Workers = ALONE, on_progress: OnProgress = ignore,
) -> TrainingJob:  # fmt: skip
    """Validate everything that the training of a method's editor needs and return the job; nothing is trained.

    ``options``: the method's settings by name, or an instance of its settings class. ``cases``: facts with paraphrases
    and neighbours, or a source as for ``errata eval --cases``; None: the host's own examples. ``quick``: whether the
    settings that are left out are those of a short training. ``files``: where its checkpoint and log are, and which
    tracker gets the log's lines. ``workers``: the processes that train together, of :mod:`errata.training.workers`.
    Raises ConfigError for a method that learns no editor, or has no short training, checkpoints or training in several
    processes where they are asked for, for a tracker that is not installed, and for unknown settings; DataError for
    cases that cannot be read.
    """
    entry = REGISTRY.get(method)
    if entry.train is None:
        learned = [name for name in REGISTRY if REGISTRY.get(name).train is not None]
        raise ConfigError(f"{method} learns no editor beforehand; methods that do: {', '.join(learned)}")
    _check_training(entry, quick, files, workers)
    config = options
    if not isinstance(config, entry.config):
        given: Mapping[str, Any] = options or {}  # type: ignore[assignment]
        config = settings.make(entry.config, {**(entry.quick if quick else {}), **given}, method)
    check_kind(entry, host)
    data: dict[str, Any] = {}
    if isinstance(cases, str):
        cases, facts = sources.read(cases, seed=EXAMPLE_SEED)
        data = {name: facts[name] for name in ("source", "sha256", "cases", "check")}
    check_pictures(entry, [request for case in cases or () for request in case.requests])
    work = workspace(host, seed=seed, examples=cases, on_progress=on_progress)
    work.training, work.workers = files, workers
    return TrainingJob(entry, config, host, work, data)


def _check_training(method: Method, quick: bool, files: TrainingFiles, workers: Workers) -> None:
    """Raise ConfigError where a method has no short training, checkpoints, log or processes, as are asked for."""
    if files.tracker is not None:
        check_tracker(files.tracker)
    if workers.count > 1 and not method.parallel:
        able = [name for name in REGISTRY if REGISTRY.get(name).parallel]
        raise ConfigError(
            f"the training of {method.name} is one process's, found {workers.count}; methods that share it: "
            f"{', '.join(able)}"
        )
    if quick and not method.quick:
        raise ConfigError(f"{method.name} has no quick training; give its settings, as steps, by themselves")
    if (files.resume or files.log or files.tracker) and not method.resumes:
        able = [name for name in REGISTRY if REGISTRY.get(name).resumes]
        raise ConfigError(
            f"the training of {method.name} writes no checkpoints and no log; methods that do: {', '.join(able)}"
        )


def with_prompt_options(
    host: Host, ask: AskOptions, *, edits: Sequence[Edit] = (), after: Edit | None = None
) -> Host:
    """Return the host with prompts formatted as asked for; what is left out is as the edits were made, if they agree.

    ``edits``: those whose answers are asked for. ``after``: one to continue from. Raises ConfigError for an unknown
    format, and for one that ``after`` was not made with.
    """
    fields = ask.prompt_fields
    images = isinstance(host, (ImageHost, TextToImageHost))
    if images and any(value is not None for value in fields.values()):
        raise ConfigError(
            f"{host.name} is one of the {kind(host.kind).plural}: it takes no prompts to answer, so leave "
            f"{', '.join(fields)} out"
        )
    if images:
        return host
    base = host.prompt_format
    recorded = {
        recorded_format(one.provenance.prompt_format) for one in (*edits, *([after] if after else ()))
    }
    if base.is_default and len(recorded) == 1 and ask.template is None:
        (base,) = recorded
    new_format = prompt_format(base, ask)
    if after is not None and {new_format} != recorded:
        raise ConfigError(
            f"the edit to continue from was made with {dict(after.provenance.prompt_format) or 'raw prompts'}, found "
            f"{new_format.to_dict()}; use the same, or leave template, system, thinking and join out"
        )
    return host.with_prompt_format(new_format)


def workspace(
    host: Host, *, seed: int, corpus: str | os.PathLike[str] | Corpus | None = None,
    examples: str | Sequence[Case] | None = None, on_progress: OnProgress = ignore,
) -> Workspace:  # fmt: skip
    """Return what fits work with: seed, corpus, examples and cache; those left out are the host's own.

    So are trained editors, unless examples are given to train others on.
    """
    if isinstance(examples, str):
        examples = sources.read(examples, seed=EXAMPLE_SEED)[0]
    own = host.resources.examples or tuple
    cases = None if examples is None else tuple(examples)
    return Workspace(
        seed=seed, corpus=host.resources.corpus if corpus is None else as_corpus(corpus),
        load_examples=own if cases is None else lambda: cases or (), folder=cache_dir(), on_progress=on_progress,
        own_editor=(cases is None and host.resources.editors) or (lambda _: None),
    )  # fmt: skip


def check_kind(method: Method, host: Host) -> None:
    """Raise ConfigError where a method edits another kind of model than the host is, naming methods that do."""
    try:
        method.check_kind(host)
    except ConfigError as error:
        fitting = [name for name in REGISTRY if host.kind in REGISTRY.get(name).hosts]
        raise ConfigError(f"{error}; methods for those: {', '.join(fitting) or 'none'}") from None


_TAKEN: Mapping[str, tuple[tuple[type, ...], str]] = {
    "requests": ((Request, ImageRequest), "requests, and a concept or contrast pairs were given; methods for those"),
    "concept": ((Concept,), "a concept shown by labelled texts, no requests: use errata erase, or an errata.Concept"),
    "contrasts": ((Contrasts,), "contrast pairs, no requests: use errata steer, or an errata.Contrasts"),
}  # fmt: skip
"""What a method may take: the types, and what is said where others are given."""


def check_takes(method: Method, requests: Sequence[AnyRequest]) -> None:
    """Raise ConfigError where a method gets requests, a concept or contrast pairs, and takes another of them."""
    types, text = _TAKEN[method.takes]
    for request in requests:
        given = next((name for name, (own, _) in _TAKEN.items() if isinstance(request, own)), None)
        if isinstance(request, types) or (given is None and method.takes == "requests"):
            continue  # what is no request at all is refused with its number
        able = [name for name in REGISTRY if REGISTRY.get(name).takes == given]
        raise ConfigError(
            f"{method.name} takes {text}{': ' + ', '.join(able) if method.takes == 'requests' else ''}"
        )


def check_pictures(method: Method, requests: Sequence[AnyRequest]) -> None:
    """Raise ConfigError where a request is about a picture and a method takes none, with the reason."""
    shown = next((r for r in requests if isinstance(r, Request) and r.image is not None), None)
    if shown is not None and method.blind:
        raise ConfigError(
            f"{method.name} takes no requests about pictures, as {shown.id or shown.target!r} is: {method.blind}"
        )


def check_requests(host: Host, requests: Sequence[AnyRequest]) -> None:
    """Raise RequestError listing every request that the host cannot take."""
    complaints = []
    for i, request in enumerate(requests):
        try:
            _check_request(host, request)
        except RequestError as error:
            complaints.append(f"request {request.id or i + 1}: {error}")
    if complaints:
        raise RequestError("\n".join(complaints))
    if not requests:
        raise RequestError("no requests given")


def _check_request(host: Host, request: AnyRequest) -> None:
    if isinstance(request, Concept):
        longest = max(request.texts, key=lambda one: len(one.text))
        length = host.length(host.encode(longest.text).ids)
        if host.window is not None and length > host.window:
            raise RequestError(f"a text is {length} tokens, the model's window is {host.window}")
        return
    if isinstance(request, Contrasts):
        for pair in request.pairs:
            for answer in (pair.positive, pair.negative):
                length = host.length(host.encode_answer(pair.prompt, answer).ids)
                if host.window is not None and length > host.window:
                    raise RequestError(
                        f"a prompt and its answer are {length} tokens, the window is {host.window}"
                    )
        return
    expected = ImageRequest if isinstance(host, ImageHost) else Request
    if not isinstance(request, expected):
        raise RequestError(
            f"{host.name} takes an errata.{expected.__name__}, found {type(request).__name__} {shown(request, 80)}"
        )
    if isinstance(host, ImageHost) and isinstance(request, ImageRequest):
        for images in (request.original, request.reference):
            if images is not None:
                host.logits(images[:1])  # the model itself says whether it takes such images
    elif isinstance(host, TextToImageHost) and isinstance(request, Request):
        head, tail = request.template
        for text in (request.text, head + request.target + tail):
            host.read(text)
    elif isinstance(request, Request):
        host.see([request])
        answer = host.encode_answer(request.text, request.target)
        length = host.length(answer.ids)
        if host.window is not None and length > host.window:
            raise RequestError(f"prompt and target are {length} tokens, the model's window is {host.window}")


def _batch_size(size: int | str) -> int | None:
    if size == "auto":
        return None
    try:
        number = int(size)
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"batch size {size!r}: expected auto or a number from 1")
    return number
