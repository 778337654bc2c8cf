"""The Python interface in three verbs: load, edit, evaluate. Thin on purpose."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from errata import config as settings
from errata import lab
from errata.bench import sources
from errata.bench.runner import Report
from errata.bench.runner import evaluate as run
from errata.bench.schedule import Schedule
from errata.edits import Edit
from errata.errors import ConfigError, shown
from errata.evaluation.check import EditCheck, answer_requests, compare_answers
from errata.files import parse_json
from errata.host.images import ImageHost, is_image_classifier, load_images
from errata.host.load import Host
from errata.host.load import load as open_host
from errata.host.prompts import prompt_format, recorded_format
from errata.methods import REGISTRY
from errata.methods._method import Method, Workspace
from errata.stats.cache import cache_dir
from errata.stats.collect import Corpus, corpus_name
from errata.types import Case, ImageRequest, Request

Tick = Callable[[str, int, int], None]

EXAMPLES, EXAMPLE_SEED = 300, 1_000_003
"""How many of the lab's facts serve as examples, and the seed they are drawn with, which no measurement uses."""


def load(
    model: str | os.PathLike[str] | nn.Module, tokenizer: Any = None, *, device: str = "auto",
    dtype: Any = "auto", revision: str | None = None, trust_remote_code: bool = False,
) -> Host:  # fmt: skip
    """Open a model: ``"lab"``, a hub name, a folder, or a live transformers model with its tokenizer.

    An image classifier, in a folder or live without tokenizer, opens as an ``ImageHost``, an encoder-decoder as
    a ``Seq2SeqHost``, a masked language model as a ``MaskedHost``, a text classifier as a ``ClassifierHost``;
    ``host.kind`` names the kind, and a method's ``hosts`` those that it edits. ``"lab"`` is always
    the embedded model; a folder of that name is ``"./lab"``. ``device``: auto, cpu, cuda, cuda:N. ``dtype``:
    auto, float32, float16, bfloat16. Raises HostError when the model cannot be opened or cannot be trusted to
    be edited.
    """
    if isinstance(model, str) and model == lab.NAME:
        return lab.load(device=device, dtype=dtype)
    if is_image_classifier(model):
        if tokenizer is not None:
            raise ConfigError("an image classifier takes no tokenizer; leave it out")
        images: Any = load_images(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        return images  # a host all the same for edits, which ask for what a ModelHost has
    return open_host(
        model, tokenizer, device=device, dtype=dtype, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def edit(
    host: Host, requests: Request | ImageRequest | Sequence[Request | ImageRequest], *,
    method: str = "memit", seed: int = 0, after: Edit | None = None, batch_size: int | str = "auto",
    corpus: str | os.PathLike[str] | Corpus | None = None, examples: str | Sequence[Case] | None = None,
    template: str | None = None, system: str | None = None, thinking: bool | str | None = None,
    join: str | None = None, on_progress: Tick = lambda *_: None, **options: Any,
) -> Edit:  # fmt: skip
    """Fit an edit for some requests and return it; the host is left as it was.

    ``after``: an edit of the same method to go on from; the result stands for both, and it is the same
    whether or not the earlier one was saved and loaded in between. ``batch_size``: how many requests to run
    at once; auto takes what suits the device. Either way batches shrink when memory runs out.

    ``template``, ``system``, ``thinking``, ``join``: how prompts are put and joined with their targets, see
    :class:`errata.host.prompts.PromptFormat`; recorded in the edit. Left out, they are those of ``after``, else
    the host's own (prompts as they stand).

    ``options`` are the method's settings, see ``errata methods NAME``. ``corpus``: a text file for
    statistics; by default the lab's own text, or text the host writes itself. ``examples``: other facts with
    paraphrases and neighbours, for methods that need them (``ike``): cases, or a source as for
    ``errata eval --cases``; by default the lab's own for the lab. Raises ConfigError for
    unknown methods or settings and for a method of another kind of model, RequestError for requests the
    host cannot take.
    """
    wanted: list[Any] = [requests] if isinstance(requests, (Request, ImageRequest)) else list(requests)
    entry = REGISTRY.get(method)
    config = settings.make(entry.config, options, method)
    check_kind(entry, host)
    host = put(host, template=template, system=system, thinking=thinking, join=join, after=after)
    check_requests(host, wanted)
    work = workspace(host, seed=seed, corpus=corpus, examples=examples, on_progress=on_progress)
    work.batch_size = _batch_size(batch_size)
    return entry.run(host, wanted, config, work, after)


def put(
    host: Host, *, template: str | None = None, system: str | None = None, thinking: bool | str | None = None,
    join: str | None = None, edits: Sequence[Edit] = (), after: Edit | None = None,
) -> Host:  # fmt: skip
    """Return the host with prompts put as asked for; what is left out is as the edits were made, if they agree.

    ``edits``: those that are asked. ``after``: one to go on from. Raises ConfigError for a format that is none, and
    for one that ``after`` was not made with.
    """
    given = {"template": template, "system": system, "thinking": thinking, "join": join}
    if isinstance(host, ImageHost) and any(value is not None for value in given.values()):
        raise ConfigError(
            f"{host.name} is an image classifier: it takes no prompts, so leave {', '.join(given)} out"
        )
    if isinstance(host, ImageHost):
        return host
    base = host.prompt_format
    recorded = {
        recorded_format(one.provenance.prompt_format) for one in (*edits, *([after] if after else ()))
    }
    if base.is_default and len(recorded) == 1 and template is None:
        (base,) = recorded
    chosen = prompt_format(base, **given)
    if after is not None and {chosen} != recorded:
        raise ConfigError(
            f"the edit to go on from was made with {dict(after.provenance.prompt_format) or 'raw prompts'}, asked is "
            f"{chosen.to_dict()}; use the same, or leave template, system, thinking and join out"
        )
    return host.with_prompt_format(chosen)


def _batch_size(given: int | str) -> int | None:
    if given == "auto":
        return None
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"batch size {given!r}: expected auto or a number from 1")
    return size


def check_edit(
    host: Host, edit: Edit, *, foreign: bool = False, options: Mapping[str, Any] | None = None,
    on_progress: Tick = lambda *_: None,
) -> EditCheck:  # fmt: skip
    """Say which requests of an edit are answered with their target: by free generation, without and with it.

    The host is left as it was. ``options``: how prompts are put, see
    :func:`errata.evaluation.observe.observe`. Raises ConfigError for an edit of images, EditError as
    :meth:`Edit.apply_` does.
    """
    requests = [request for request in edit.provenance.requests if isinstance(request, Request)]
    if len(requests) != len(edit.provenance.requests):
        raise ConfigError(
            "requests of images are not kept in an edit; compare host.labels(images) with the edit on"
        )

    def answers(phase: str) -> list[str]:
        return answer_requests(
            host, requests, options=options, on_progress=lambda done, total: on_progress(phase, done, total)
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
    corpus: str | os.PathLike[str] | Corpus | None = None, examples: str | Sequence[Case] | None = None,
    on_progress: Tick = lambda *_: None, **options: Any,
) -> Report:  # fmt: skip
    """Measure a method on cases, or given edits on all of them. The host is left as it was.

    With ``edit``, that edit, or all of several together, is in place for all cases. With ``method`` and its
    ``options``, cases are edited on a ``schedule``: ``single``, each alone and taken back; ``batch:N``, N in
    one fit, taken back; ``sequential:N``, N after N, all edits staying in place, observed after ``at`` edits (numbers,
    ``each``, ``every:N``, ``end``; default 10, 50, 100, 200, 500 ... and the end) together with the
    perplexity of neutral text. ``after``: the edit of a sequence's first cases, to go on from; ``keep`` is
    handed the report so far and the edit at each of its checkpoints. ``probes``: kinds to ask, default
    all. ``template``: how a prompt is put: ``raw``, ``question`` (an answer cue behind questions), ``chat``
    (the tokenizer's template) or ``auto``; with it ``system``, ``thinking`` and ``join``, see :func:`edit`.
    Requests are edited as probes are asked, and a given edit is asked as it was made unless something else
    is given. ``max_new_tokens``: longest short answer. Raises ConfigError for what does not belong together.

    Cases of the lab for edits that are in place together: ``lab.cases(n, together=True)``.
    """
    if isinstance(host, ImageHost):
        raise ConfigError(
            f"cases are texts, and {host.name} is an image classifier: compare host.logits(images)"
        )
    work = workspace(host, seed=seed, corpus=corpus, examples=examples, on_progress=on_progress)
    if method is None and options:
        raise ConfigError(f"settings {sorted(options)} need a method")
    edits: Sequence[Edit] = [edit] if isinstance(edit, Edit) else edit or []
    host = put(host, template=template, system=system, thinking=thinking, join=join, edits=edits, after=after)
    if method is not None and cases:
        check_kind(REGISTRY.get(method), host)
        check_requests(host, [request for case in cases for request in case.requests])
    return run(
        host, cases, method=method, edit=edit, work=work, options=options,
        schedule=Schedule.parse(schedule) if isinstance(schedule, str) else schedule, at=at, probes=probes,
        texts=lab.neutral_texts(200) if host.name == lab.NAME else None, after=after, keep=keep,
        asking={**host.prompt_format.asking(), "max_new_tokens": max_new_tokens}, tick=on_progress,
    )  # fmt: skip


def workspace(
    host: Host, *, seed: int, corpus: str | os.PathLike[str] | Corpus | None = None,
    examples: str | Sequence[Case] | None = None, on_progress: Tick = lambda *_: None,
) -> Workspace:  # fmt: skip
    """Build what a fit works with: seed, corpus, examples, cache."""
    if isinstance(corpus, (str, os.PathLike)):
        corpus = _file_corpus(Path(corpus))
    elif corpus is None and host.name == lab.NAME:
        corpus = lab.corpus()
    if isinstance(examples, str):
        examples = sources.read(examples, seed=EXAMPLE_SEED)[0]
    given = tuple(examples or ())
    own = examples is None and host.name == lab.NAME

    def drawn() -> Sequence[Case]:
        return lab.cases(EXAMPLES, seed=EXAMPLE_SEED) if own else given

    return Workspace(
        seed=seed, corpus=corpus, load_examples=drawn, folder=cache_dir(), on_progress=on_progress
    )


def check_kind(method: Method, host: Host) -> None:
    """Raise ConfigError where a method edits another kind of model than the host is."""
    try:
        method.check_kind(host)
    except ConfigError as error:
        fitting = [name for name in REGISTRY if host.kind in REGISTRY.get(name).hosts]
        raise ConfigError(f"{error}; methods for those: {', '.join(fitting) or 'none'}") from None


def check_requests(host: Host, requests: Sequence[Request | ImageRequest]) -> None:
    """Raise RequestError listing every request that the host cannot take."""
    from errata.errors import RequestError

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


def _check_request(host: Host, request: Request | ImageRequest) -> None:
    from errata.errors import RequestError

    wanted = ImageRequest if isinstance(host, ImageHost) else Request
    if not isinstance(request, wanted):
        raise RequestError(
            f"{host.name} takes an errata.{wanted.__name__}, found {type(request).__name__} {shown(request, 80)}"
        )
    if isinstance(host, ImageHost) and isinstance(request, ImageRequest):
        for images in (request.original, request.reference):
            if images is not None:
                host.logits(images[:1])  # the model itself says whether it takes such images
    elif isinstance(request, Request):
        answer = host.encode_answer(request.text, request.target)
        if host.window is not None and len(answer.ids) > host.window:
            raise RequestError(
                f"prompt and target are {len(answer.ids)} tokens, the model's window is {host.window}"
            )


def _file_corpus(path: Path) -> Corpus:
    """Stream a text file by paragraphs, or the ``text`` field of a .jsonl file; named by its content."""
    from errata.errors import DataError

    def texts() -> Iterator[str]:
        if path.exists() and not path.is_file():
            raise DataError(f"cannot read corpus {path}: it is no regular file")
        try:
            with path.open(encoding="utf-8-sig") as file:
                yield from _records(path, file) if path.suffix.lower() == ".jsonl" else _paragraphs(file)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read corpus {path}: {error}") from error

    if next(texts(), None) is None:
        raise DataError(f"corpus {path} holds no text")
    return Corpus(corpus_name(path.name, texts()), texts)


def _paragraphs(lines: Iterable[str]) -> Iterator[str]:
    """Join lines up to the next empty one."""
    for empty, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not empty:
            yield "".join(group).strip()


def _records(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """Read the texts of JSON lines. Raises DataError for a line without one."""
    from errata.errors import DataError

    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"corpus {path}, line {number}"
        record = parse_json(line, lambda reason, place=place: DataError(f"{place}: {reason}"))
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DataError(f'corpus {path}, line {number}: expected {{"text": "..."}}, found no text there')
        if text.strip():
            yield text
