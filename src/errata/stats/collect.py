"""Second moments of keys over a corpus, for all sites in one forward pass that stops after the last of them.

Texts are packed: joined with the tokenizer's begin (or end) token between them and split into rows of one
length, so that there is no padding. Each row starts with that token, as a text would, because models treat the
first position specially; the moments exclude that token at every position.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from errata.errors import ConfigError, DataError, HostError
from errata.host import hooks, locking
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.tokens import Batch
from errata.linalg.block_moments import AnyMoments, BlockMoments
from errata.linalg.moments import BLOCK, Eigen, Moments, eigen
from errata.progress import OnCount, ignore
from errata.stats import cache
from errata.types import Corpus

BATCH_TOKENS = 4096
ROW_TOKENS = 512
SAVE_SECONDS = 60.0


@locking.exclusive
def second_moments(
    host: Host,
    sites: Sequence[Site],
    corpus: Corpus,
    *,
    tokens: int,
    folder: Path | None = None,
    on_tokens: OnCount = ignore,
    save_seconds: float = SAVE_SECONDS,
) -> dict[Site, AnyMoments]:
    """Return the second moment of each site's input over ``tokens`` tokens of a corpus.

    A shorter corpus gives fewer, see ``Moments.count``. Results are stored in ``folder`` under a key of host,
    site, corpus, budget, dtype and row length; None stores nothing. With a folder, the sums are also stored about
    every ``save_seconds``, so that an interrupted pass resumes where it was and gives the same bits. Keys are in
    the host's own precision, products of them in float32.

    Raises DataError for a corpus without text or a folder that cannot be written, HostError for keys
    that are not finite, and if a folder is given while an edit is in place.
    """
    if tokens < 1:
        raise ConfigError(f"a token budget of {tokens} gives no statistics; expected 1 or more")
    if folder is not None and host.placed:
        raise HostError("statistics of an edited host are not stored: revert its edits, or give no folder")
    facts_of = {site: facts(host, site, corpus, tokens=tokens) for site in sites}
    from_disk = {} if folder is None else {s: cache.read(folder, f) for s, f in facts_of.items()}
    moments_of = {
        site: moments.to(device_of(host, site)) for site, moments in from_disk.items() if moments is not None
    }
    missing = [site for site in facts_of if site not in moments_of]
    if missing:
        progress = _Progress(folder, _shared(host, corpus, tokens), save_seconds)
        fresh = _collect(host, missing, corpus, tokens, progress, on_tokens)
        if folder is not None:
            for site, moments in fresh.items():
                cache.write(folder, facts_of[site], moments)
        progress.drop()
        moments_of.update(fresh)
    return {site: moments_of[site] for site in sites}


def eigen_of(
    host: Host, site: Site, corpus: Corpus, *, tokens: int, folder: Path | None, moments: AnyMoments,
    mixed_with: str = "",
) -> Eigen:  # fmt: skip
    """Return the eigendecomposition of a site's second moment, cached in ``folder``.

    Pass the arguments that the moments were computed with; folder None stores nothing. ``mixed_with``: what else than
    the corpus is in them, and with which share.
    """
    if folder is None:
        return eigen(moments.second)
    more = {"mixed with": mixed_with} if mixed_with else {}
    return cache.eigen(folder, {**facts(host, site, corpus, tokens=tokens), **more}, moments)


def facts(host: Host, site: Site, corpus: Corpus, *, tokens: int) -> dict[str, str | int]:
    """Return everything that a site's moments depend on, the cache key of :mod:`errata.stats.cache`."""
    return {**_shared(host, corpus, tokens), "site": site.parameter}


def _shared(host: Host, corpus: Corpus, tokens: int) -> dict[str, str | int]:
    return {
        "host": host.fingerprint,
        "corpus": corpus.name,
        "tokens": tokens,
        "dtype": str(host.dtype),
        "rows": row_tokens(host),
    }


def corpus_name(label: str, texts: Iterable[str]) -> str:
    """Return a name for a corpus with a hash of its content."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
        digest.update(b"\0")
    return f"{label}@{digest.hexdigest()[:12]}"


def public_corpus(identifier: str) -> Corpus:
    """Stream the ``text`` column of a Hub dataset's training split; identifier ``owner/name[:config]``.

    Needs the package ``datasets`` and either network or the dataset in its cache. Raises DataError with what to
    install or download.
    """
    head, _, config = identifier.partition(":")
    instead = "or save its text to a file (.txt, or .jsonl with a field text) and name that"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DataError(
            f"no file {identifier!r} here; to read it as a public dataset: pip install datasets; {instead}"
        ) from error

    def stream() -> Iterator[str]:
        try:
            for row in datasets.load_dataset(head, config or None, split="train", streaming=True):
                yield row["text"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot read dataset {identifier!r}: {error}; {instead}") from error

    try:
        version = datasets.load_dataset_builder(head, config or None).hash
    except (OSError, ValueError) as error:
        raise DataError(f"no file and no dataset {identifier!r}: {error}; download it, {instead}") from error
    return Corpus(f"{identifier}@{version}", stream)


# --- what it costs --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Estimated cost of a pass, from shapes alone."""

    tokens: int
    flop: float
    """Floating-point operations: the forward pass to the last site, and the outer products."""
    disk_bytes: int
    """Size of the stored moments; twice that while the pass runs."""
    eigen_bytes: int
    """Size of their eigendecompositions, if a method needs them."""


def cost(host: Host, sites: Sequence[Site], *, tokens: int) -> Cost:
    """Estimate the cost of computing the moments of some sites."""
    if not sites:
        return Cost(tokens, 0.0, 0, 0)
    last = max(site.layer for site in sites)
    width, length = host.layout.width, row_tokens(host)
    forward = 0
    for path in host.layout.blocks[: last + 1]:
        matrices = [p for p in host.model.get_submodule(path).parameters() if p.ndim > 1]
        forward += 2 * sum(p.numel() for p in matrices) + 4 * width * length  # attention's two products
    sizes = [
        max(1, s.experts) * sum((width - i) * min(BLOCK, width - i) for i in range(0, width, BLOCK))
        for s, width in ((s, s.d_in // max(1, s.experts)) for s in sites)
    ]
    return Cost(
        tokens=tokens,
        flop=float(tokens) * (forward + 2 * sum(sizes)),
        disk_bytes=8 * sum(size + site.d_in for size, site in zip(sizes, sites, strict=True)),
        eigen_bytes=8 * sum(site.d_in**2 // max(1, site.experts) + site.d_in for site in sites),
    )


# --- the pass -------------------------------------------------------------------------------


def row_tokens(host: Host) -> int:
    """Length of packed rows: 512 tokens, or the model's window where that is shorter."""
    return min(ROW_TOKENS, host.window or ROW_TOKENS)


def _collect(
    host: Host,
    sites: Sequence[Site],
    corpus: Corpus,
    tokens: int,
    progress: _Progress,
    on_tokens: OnCount,
) -> dict[Site, AnyMoments]:
    batches, moments = _start(host, sites, corpus, tokens, progress)
    count = next(iter(moments.values())).count
    if count:
        on_tokens(count, tokens)
    for rows in batches:
        _add(host, rows, moments)
        progress.count_batch(rows)
        progress.keep({site.parameter: m for site, m in moments.items()})
        count = next(iter(moments.values())).count
        on_tokens(count, tokens)
    if not count:
        raise DataError(f"corpus {corpus.name} has no text to compute statistics over")
    return moments


def _start(
    host: Host, sites: Sequence[Site], corpus: Corpus, tokens: int, progress: _Progress
) -> tuple[Iterator[list[list[int]]], dict[Site, AnyMoments]]:
    """Return the remaining batches, and the sums so far: zeros, or those of an interrupted pass."""
    earlier = progress.earlier()
    if earlier is not None and all(site.parameter in earlier.moments for site in sites):
        batches = _batches(host, corpus, tokens)
        for rows in batches:
            progress.count_batch(rows)
            if progress.batches == earlier.batches:
                break
        if progress.digest.hexdigest() == earlier.digest:
            return batches, {s: earlier.moments[s.parameter].to(device_of(host, s)) for s in sites}
        warnings.warn(
            f"corpus {corpus.name} has changed since its pass was interrupted; starting again",
            RuntimeWarning,
            stacklevel=2,
        )
        progress.reset()
    return _batches(host, corpus, tokens), {site: no_sums(host, site) for site in sites}


def no_sums(host: Host, site: Site) -> AnyMoments:
    """Return the sums of no keys; those of stacked experts by expert."""
    if site.experts:
        return BlockMoments.empty(site.experts, site.d_in // site.experts, device_of(host, site))
    return Moments.empty(site.d_in, device_of(host, site))


@dataclass
class _Progress:
    """The progress of a pass, in memory and on disk."""

    folder: Path | None
    facts: Mapping[str, str | int]
    seconds: float
    batches: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    due: float = field(init=False)

    def __post_init__(self) -> None:
        self.due = time.monotonic() + self.seconds

    def reset(self) -> None:
        """Restart at the beginning of the corpus."""
        self.batches, self.digest = 0, hashlib.sha256()

    def count_batch(self, rows: Sequence[Sequence[int]]) -> None:
        """Count a batch as read."""
        self.batches += 1
        self.digest.update(repr(rows).encode())

    def earlier(self) -> cache.Partial | None:
        return None if self.folder is None else cache.read_partial(self.folder, self.facts)

    def keep(self, moments: Mapping[str, AnyMoments]) -> None:
        """Store the sums if it is due; the longer writing takes, the longer the next interval."""
        start = time.monotonic()
        if self.folder is None or start < self.due:
            return
        cache.write_partial(
            self.folder, self.facts, cache.Partial(moments, self.batches, self.digest.hexdigest())
        )
        now = time.monotonic()
        self.due = now + self.seconds * (1 + now - start)

    def drop(self) -> None:
        """Remove the stored sums."""
        if self.folder is not None:
            cache.drop_partial(self.folder, self.facts)


def _add(host: Host, rows: list[list[int]], moments: Mapping[Site, AnyMoments]) -> None:
    """Run a batch of rows of one length and add every site's keys at texts' tokens to its moments."""
    batch = host.batch(rows)
    mark = _begin_token(host)
    add_keys(host, batch, batch.ids != (-1 if mark is None else mark), moments)


def add_keys(host: Host, batch: Batch, counted: Tensor, moments: Mapping[Site, AnyMoments]) -> None:
    """Run a batch and add every site's keys at the tokens ``counted``, bool ``[rows, length]``, to its moments.

    Raises HostError for a site that the pass does not reach, and for keys that are not finite.
    """
    remaining = set(moments)

    def hook_for(site: Site) -> Callable[[Tensor], None]:
        def add(keys: Tensor) -> None:
            keys = keys.reshape(*batch.ids.shape, site.d_in)
            moments[site].update_(keys[counted.to(keys.device)])
            remaining.discard(site)
            if not remaining:
                raise hooks.Stopped

        return add

    # hooks are active only during the pass itself: a corpus may be generated by the model
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for site in moments:
            stack.enter_context(hooks.on_input(host.model.get_submodule(site.name), hook_for(site)))
        with contextlib.suppress(hooks.Stopped):
            host.forward(batch, keep=1)
    if remaining:
        raise HostError(f"{min(site.name for site in remaining)} was not run by the model's forward pass")
    for site, sums in moments.items():
        if not torch.isfinite(sums.total).all():
            raise HostError(
                f"keys of {site.name} are not finite in {host.dtype}; open the model in a wider dtype"
            )


def device_of(host: Host, site: Site) -> torch.device:
    """Return the device for a site's sums: its weight's, or the CPU if the weight is offloaded."""
    module = host.model.get_submodule(site.name)
    tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    place = host.device if tensor is None else tensor.device
    return torch.device("cpu") if place.type == "meta" else place


def _begin_token(host: Host) -> int | None:
    """Return the id of the begin token, or the end token where a tokenizer has no begin token."""
    for name in ("bos_token_id", "eos_token_id"):
        value = getattr(host.tokenizer, name, None)
        if value is not None:
            return int(value)
    return None


def _batches(host: Host, corpus: Corpus, tokens: int) -> Iterator[list[list[int]]]:
    """Batch rows of full length; a shorter row, which can only be the last, is a batch of its own."""
    length = row_tokens(host)
    group: list[list[int]] = []
    for row in _rows(host, corpus, tokens):
        if len(row) < length:
            if group:
                yield group
            yield [row]
            return
        group.append(row)
        if len(group) * length >= BATCH_TOKENS:
            yield group
            group = []
    if group:
        yield group


def _rows(host: Host, corpus: Corpus, tokens: int) -> Iterator[list[int]]:
    """Yield rows of the joined texts until there are ``tokens`` tokens, not counting begin tokens."""
    mark = _begin_token(host)
    head = [] if mark is None else [mark]
    row_size = max(1, row_tokens(host) - len(head))
    remaining, open_row = tokens, []
    for text in corpus.texts():
        ids = list(host.encode(text).ids)
        if head and ids[:1] == head:
            del ids[0]
        if not ids:
            continue
        open_row += [*head, *ids] if open_row else ids
        at = 0
        while len(open_row) - at >= row_size:
            row = _truncate(open_row[at : at + row_size], remaining, mark)
            yield head + row
            remaining -= sum(token != mark for token in row)
            if remaining <= 0:
                return
            at += row_size
        del open_row[:at]
    row = _truncate(open_row, remaining, mark)
    if any(token != mark for token in row):
        yield head + row


def _truncate(row: list[int], limit: int, mark: int | None) -> list[int]:
    """Truncate a row to at most ``limit`` tokens, not counting begin tokens."""
    if len(row) <= limit:
        return row
    for stop, token in enumerate(row, 1):
        limit -= token != mark
        if limit <= 0:
            return row[:stop]
    return row
