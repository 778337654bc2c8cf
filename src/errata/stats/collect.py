"""Second moments of keys over a corpus: every layer asked for in one pass that stops after the last."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from errata.host import hooks
from errata.host.layout import Site
from errata.host.load import Host
from errata.linalg.moments import Moments
from errata.stats import cache

BATCH_TOKENS = 4096
ROW_TOKENS = 256


@dataclass(frozen=True)
class Corpus:
    """Texts to take statistics over, with a name that says where they come from."""

    name: str
    texts: Callable[[], Iterable[str]]
    """Makes the texts anew, in the same order each time."""


def second_moments(
    host: Host,
    sites: Sequence[Site],
    corpus: Corpus,
    *,
    tokens: int,
    folder: Path | None = None,
    on_tokens: Callable[[int, int], None] = lambda done, wanted: None,
) -> dict[Site, Moments]:
    """Return the second moment of each site's input over up to ``tokens`` tokens of a corpus.

    Rows never exceed the model's window; begin and padding tokens are left out. Results are kept in
    ``folder`` under a key of model, site, corpus and budget; None keeps nothing.
    """
    facts = {site: _facts(host, site, corpus, tokens) for site in sites}
    known = {} if folder is None else {s: cache.read(folder, f) for s, f in facts.items()}
    done = {site: moments for site, moments in known.items() if moments is not None}
    missing = [site for site in sites if site not in done]
    if missing:
        fresh = _collect(host, missing, corpus, tokens, on_tokens)
        for site, moments in fresh.items():
            if folder is not None:
                cache.write(folder, facts[site], moments)
        done.update(fresh)
    return {site: done[site] for site in sites}


def _facts(host: Host, site: Site, corpus: Corpus, tokens: int) -> dict[str, str | int]:
    return {
        "host": host.fingerprint,
        "site": site.parameter,
        "corpus": corpus.name,
        "tokens": tokens,
        "dtype": str(host.dtype),
        "rows": ROW_TOKENS,
    }


def corpus_name(label: str, texts: Iterable[str]) -> str:
    """Name a corpus by its content."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return f"{label}@{digest.hexdigest()[:12]}"


def _collect(
    host: Host,
    sites: Sequence[Site],
    corpus: Corpus,
    tokens: int,
    on_tokens: Callable[[int, int], None],
) -> dict[Site, Moments]:
    moments = {site: Moments.empty(site.d_in, host.device) for site in sites}
    modules = {site: host.model.get_submodule(site.name) for site in sites}
    last = modules[max(sites, key=lambda site: site.layer)]
    seen = 0
    for rows in _batches(host, corpus, tokens):
        batch = host.batch(rows)
        counted = (batch.mask.bool() & (batch.ids != _begin(host))).reshape(-1)

        def add(site: Site, counted: Tensor = counted) -> Callable[[Tensor], None]:
            return lambda keys: moments[site].update_(keys.reshape(-1, site.d_in)[counted])

        # hooks stand only around the pass itself: a corpus may be the model's own writing
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for site in sites:
                stack.enter_context(hooks.on_input(modules[site], add(site)))
            stack.enter_context(hooks.stop_after(last))
            with contextlib.suppress(hooks.Stopped):
                host.forward(batch, keep=1)
        seen += int(counted.sum())
        on_tokens(min(seen, tokens), tokens)
    return moments


def _begin(host: Host) -> int:
    begin = getattr(host.tokenizer, "bos_token_id", None)
    return -1 if begin is None else int(begin)


def _batches(host: Host, corpus: Corpus, tokens: int) -> Iterator[list[tuple[int, ...]]]:
    length = min(ROW_TOKENS, host.window or ROW_TOKENS)
    rows: list[tuple[int, ...]] = []
    taken = 0
    for text in corpus.texts():
        ids = host.encode(text).ids[: max(1, min(length, tokens - taken + 1))]
        if not ids:
            continue
        rows.append(ids)
        taken += len(ids)
        if sum(map(len, rows)) >= BATCH_TOKENS:
            yield rows
            rows = []
        if taken >= tokens:
            break
    if rows:
        yield rows
