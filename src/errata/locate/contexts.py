"""Context prefixes: short texts the model writes itself, put before a prompt so that keys and values
do not fit one wording only. Drawn from a seed; the global random state is not touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import regex

from errata.host.load import Host, sample_rows
from errata.host.tokens import encode_prompt
from errata.stats.collect import Corpus
from errata.types import Request
from errata.writing import TERMINAL, is_unspaced

STARTS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True)
class Context:
    """A text before a prompt and how much it counts among its siblings."""

    prefix: str
    weight: float


def sample(host: Host, starts: Sequence[str], *, tokens: int, top_k: int | None, seed: int) -> list[str]:
    """Continue texts by sampling; returns start and continuation. Deterministic in ``seed``."""
    rows = [encode_prompt(host.tokenizer, text).ids for text in starts]
    if host.window is not None:
        tokens = max(1, min(tokens, host.window - max(map(len, rows)) - 1))
    continued = sample_rows(host, rows, tokens, top_k=top_k, seed=seed)
    return [start + text for start, text in zip(starts, continued, strict=True)]


def prefixes(
    host: Host, *, seed: int, groups: Sequence[tuple[int, int]], weighting: str = "flat", top_k: int = 5
) -> list[Context]:
    """Return the bare prompt and sampled prefixes.

    ``groups`` lists (how many, tokens each). ``weighting``: ``flat`` counts every context alike, as
    ROME does; ``half_bare`` gives the bare prompt one half and the others the rest, as MEMIT does.
    """
    texts: list[str] = []
    for group, (count, length) in enumerate(groups):
        starts = [STARTS[i % len(STARTS)] for i in range(count)]
        for text in sample(host, starts, tokens=length, top_k=top_k, seed=seed * 101 + group):
            texts.append(_clean(text))
    return weigh(texts, weighting)


def excerpts(
    host: Host, corpus: Corpus | None, *, groups: Sequence[tuple[int, int]], weighting: str = "flat"
) -> list[Context]:
    """Return the bare prompt and the beginnings of a corpus's texts, for hosts that write none of their own.

    ``groups`` and ``weighting`` as in :func:`prefixes`; no corpus: the bare prompt alone.
    """
    lengths = [length for count, length in groups for _ in range(count)]
    texts: list[str] = []
    for text, length in zip(corpus.texts() if corpus is not None else (), lengths, strict=False):
        spans = host.encode(text, special=False).spans
        texts.append(_clean(text[: spans[min(length, len(spans)) - 1][1]] if spans else text))
    return weigh(texts, weighting)


def weigh(texts: Sequence[str], weighting: str) -> list[Context]:
    """Return the bare prompt and prefixes as they stand, weighted as :func:`prefixes` says."""
    total = 1 + len(texts)
    if weighting == "flat" or not texts:
        return [Context("", 1 / total), *(Context(text, 1 / total) for text in texts)]
    return [Context("", 0.5), *(Context(text, 0.5 / len(texts)) for text in texts)]


def shorten(host: Host, prefix: str, request: Request) -> str:
    """Return a prefix, without its first words where it would not fit the window before a request's text.

    The text behind it, with its target, is as long as it may be in the window; nothing is left of the prefix
    where there is no room.
    """
    window = host.window
    while prefix and window is not None:
        over = _length(host, prefix, request) - window
        if over <= 0:
            break
        words = prefix.split()
        prefix = " ".join(words[max(1, over // 4) :])  # a word is seldom more than a few tokens
        prefix = f"{prefix} " if prefix else ""
    return prefix


def prompt_behind(host: Host, prefix: str, request: Request) -> str:
    """Return a request's prompt behind as much of a context prefix as fits; in a conversation inside its turn."""
    return host.prefixed(request.text, shorten(host, prefix, request), request.span[0])


def _length(host: Host, prefix: str, request: Request) -> int:
    """Count the tokens of prefix, prompt and target."""
    return len(host.encode_answer(request.text, request.target, prefix=prefix, before=request.span[0]).ids)


def _clean(text: str) -> str:
    """End the prefix as a sentence: no line breaks, no half characters, no double stops."""
    words = " ".join(text.replace("\N{REPLACEMENT CHARACTER}", "").split())
    body = regex.sub(rf"[\s,;:、，；：{TERMINAL}]+\Z", "", words)
    return body + ("\N{IDEOGRAPHIC FULL STOP}" if is_unspaced(body[-1:]) else ". ")


def sampled_corpus(host: Host, *, seed: int = 0, texts: int = 96, length: int = 160) -> Corpus:
    """Let the model write its own corpus: ancestral samples from its begin token.

    For hosts that come without a corpus; needs no data and no network.
    """

    def write() -> Iterator[str]:
        for first in range(0, texts, 16):
            rows = min(16, texts - first)
            yield from sample(host, [""] * rows, tokens=length, top_k=None, seed=seed * 1000 + first)

    return Corpus(f"sampled from the model, seed {seed}, {texts} x {length}", write)
