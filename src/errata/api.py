"""The Python interface in three verbs: load, edit, evaluate. Thin on purpose."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from errata import config as settings
from errata import lab
from errata.bench.runner import Report
from errata.bench.runner import evaluate as run
from errata.edits import Edit
from errata.errors import ConfigError
from errata.host.load import Host
from errata.host.load import load as open_host
from errata.methods import REGISTRY
from errata.methods._method import Workspace
from errata.stats.cache import cache_dir
from errata.stats.collect import Corpus, corpus_name
from errata.types import Case, Request

Tick = Callable[[str, int, int], None]


def load(
    model: str | os.PathLike[str] | nn.Module, tokenizer: Any = None, *, device: str = "auto",
    dtype: Any = "auto", revision: str | None = None, trust_remote_code: bool = False,
) -> Host:  # fmt: skip
    """Open a model: ``"lab"``, a hub name, a folder, or a live transformers model with its tokenizer.

    ``"lab"`` is always the embedded model; a folder of that name is ``"./lab"``. ``device``: auto, cpu,
    cuda, cuda:N. ``dtype``: auto, float32, float16, bfloat16. Raises HostError when the model cannot be
    opened or cannot be trusted to be edited.
    """
    if isinstance(model, str) and model == lab.NAME:
        return lab.load(device=device, dtype=dtype)
    return open_host(
        model, tokenizer, device=device, dtype=dtype, revision=revision,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def edit(
    host: Host, requests: Request | Sequence[Request], *, method: str = "memit", seed: int = 0,
    corpus: str | os.PathLike[str] | Corpus | None = None, on_progress: Tick = lambda *_: None, **options: Any,
) -> Edit:  # fmt: skip
    """Fit an edit for some requests and return it; the host is left as it was.

    ``options`` are the method's settings, see ``errata methods NAME``. ``corpus``: a text file for
    statistics; by default the lab's own text, or text the host writes itself. Raises ConfigError for
    unknown methods or settings, RequestError for requests the host cannot take.
    """
    wanted = [requests] if isinstance(requests, Request) else list(requests)
    entry = REGISTRY.get(method)
    config = settings.make(entry.config, options, method)
    check_requests(host, wanted)
    work = workspace(host, seed=seed, corpus=corpus, on_progress=on_progress)
    return entry.fit(host, wanted, config, work)


def evaluate(
    host: Host, cases: Sequence[Case], *, method: str | None = None, edit: Edit | None = None, seed: int = 0,
    corpus: str | os.PathLike[str] | Corpus | None = None, on_progress: Tick = lambda *_: None, **options: Any,
) -> Report:  # fmt: skip
    """Measure a method on cases, one edit at a time, or one edit on all of them.

    With ``method``, each case is fitted, observed and taken back; with ``edit``, that edit is in place
    for all. The host is left as it was. ``options`` are the method's settings.
    """
    work = workspace(host, seed=seed, corpus=corpus, on_progress=on_progress)
    if method is None and options:
        raise ConfigError(f"settings {sorted(options)} need a method")
    if method is not None and cases:
        check_requests(host, [case.request for case in cases])
    return run(host, cases, method=method, edit=edit, work=work, options=options, tick=on_progress)


def workspace(
    host: Host, *, seed: int, corpus: str | os.PathLike[str] | Corpus | None = None,
    on_progress: Tick = lambda *_: None,
) -> Workspace:  # fmt: skip
    """Build what a fit works with: seed, corpus, cache."""
    if isinstance(corpus, (str, os.PathLike)):
        corpus = _file_corpus(Path(corpus))
    elif corpus is None and host.name == lab.NAME:
        corpus = lab.corpus()
    return Workspace(seed=seed, corpus=corpus, folder=cache_dir(), on_progress=on_progress)


def check_requests(host: Host, requests: Sequence[Request]) -> None:
    """Raise RequestError listing every request that the host cannot take."""
    from errata.errors import RequestError

    complaints = []
    for i, request in enumerate(requests):
        try:
            answer = host.encode_answer(request.text, request.target)
            if host.window is not None and len(answer.ids) > host.window:
                raise RequestError(
                    f"prompt and target are {len(answer.ids)} tokens, the model's window is {host.window}"
                )
        except RequestError as error:
            complaints.append(f"request {request.id or i + 1}: {error}")
    if complaints:
        raise RequestError("\n".join(complaints))
    if not requests:
        raise RequestError("no requests given")


def _file_corpus(path: Path) -> Corpus:
    from errata.errors import DataError

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read corpus {path}: {error}") from error
    paragraphs = [p.strip() for p in text.split("\n\n") if p.strip()]
    if not paragraphs:
        raise DataError(f"corpus {path} holds no text")
    return Corpus(corpus_name(path.name, paragraphs), lambda: paragraphs)
