"""What a model recites of a corpus: discovered with true prefixes, extracted by free sampling, secrets by their rank.

Discoverable memorisation as in arXiv 2202.07646 (the true next tokens are the most probable ones after a true prefix)
and (n, p)-discoverable as in 2410.19482 (with probability p one of n samples gives them); extractable as in 2311.17035
(sampled without knowing the corpus and found in it), with the Good-Turing estimate of what was not seen yet; exposure
of planted secrets as in 1802.08232. All matches are of whole tokens, inside one text.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from errata.errors import ConfigError, DataError
from errata.host.generate import sample_rows
from errata.host.host import Host
from errata.host.kinds import CAUSAL
from errata.host.tokens import Answer, by_length, encode_prompt
from errata.inspect.extract_index import TokenIndex
from errata.progress import OnCount, ignore

BATCH_TOKENS = 8192
DISTINCT = 0.6
"""Least share of different tokens in a stretch that counts: repeated ones are found in any corpus."""
CHANCE = 0.9
"""p of (n, p)-discoverable."""
SAMPLES = (1, 10, 100, 1000)
"""n of (n, p)-discoverable."""


# --- with true prefixes ---------------------------------------------------------------------


@dataclass(frozen=True)
class Recital:
    """How a model continues a true prefix, compared with the true continuation."""

    text: int
    """Place of the text in the corpus, from 0."""
    greedy: bool
    """Whether every token of the continuation is the most probable one: greedy decoding gives it."""
    log_probability: float
    """Of the whole continuation under the sampling scheme, nats."""
    strength: float
    """Extraction strength, 1 - k / w: k of the w tokens must be given so that the rest are the most probable ones."""
    exact: float
    """Share of tokens that are the most probable ones, each after the true tokens before it."""

    def samples(self, chance: float = CHANCE) -> float:
        """Return after how many samples the continuation came with this probability; infinite for never."""
        p = math.exp(self.log_probability)
        if p >= 1:
            return 1.0
        return math.log1p(-chance) / math.log1p(-p) if p > 0 else math.inf


@dataclass(frozen=True)
class Discovery:
    """Discoverable memorisation with one length of prefix."""

    prefix: int
    suffix: int
    texts: int
    """Texts that are long enough."""
    greedy: float
    """Share of them that greedy decoding gives."""
    interval: tuple[float, float]
    """95 % Wilson interval of that share."""
    within: dict[int, float]
    """Share that n samples give with probability ``CHANCE``, by n."""
    strength: float
    exact: float
    """Means of :class:`Recital`."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def recitals(
    host: Host, texts: Sequence[Sequence[int]], *, prefix: int, suffix: int, temperature: float = 1.0,
    top_k: int | None = None, on_texts: OnCount = ignore,
) -> list[Recital]:  # fmt: skip
    """Compare what a host makes of the first tokens of texts with what follows; texts that are too short are left out.

    ``temperature`` and ``top_k``, the most probable tokens that are sampled from, act before probabilities are
    multiplied. Raises ConfigError for lengths and temperatures that are not positive.
    """
    _check(host)
    if prefix < 1 or suffix < 1 or temperature <= 0 or (top_k is not None and top_k < 1):
        raise ConfigError("prefix, suffix, temperature and top_k have to be positive")
    chosen = [i for i, ids in enumerate(texts) if len(ids) >= prefix + suffix]
    rows = [tuple(texts[i][: prefix + suffix]) for i in chosen]
    result: dict[int, Recital] = {}
    for group in by_length(rows, BATCH_TOKENS):
        batch = host.batch([rows[i][:-1] for i in group])
        row = torch.arange(len(group)).repeat_interleave(suffix)
        at = torch.arange(prefix - 1, prefix + suffix - 1).repeat(len(group))
        with torch.no_grad():
            logits = host.forward_at(batch, row, at).float().cpu().view(len(group), suffix, -1)
        true = torch.tensor([rows[i][prefix:] for i in group])
        for line, i in enumerate(group):
            result[i] = _recital(chosen[i], logits[line], true[line], temperature, top_k)
        on_texts(len(result), len(rows))
    return [result[i] for i in range(len(rows))]


def _recital(text: int, logits: Tensor, true: Tensor, temperature: float, top_k: int | None) -> Recital:
    """Compare logits ``[w, vocab]`` with the true tokens ``[w]``."""
    right = logits.argmax(1) == true
    wrong = (~right).nonzero().flatten()
    given = int(wrong[-1]) + 1 if len(wrong) else 0
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[1]), dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    logs = (logits / temperature).log_softmax(1)[torch.arange(len(true)), true]
    size = len(true)
    return Recital(text, not len(wrong), float(logs.sum()), 1 - given / size, float(right.float().mean()))


def discovery(found: Sequence[Recital], *, prefix: int, suffix: int) -> Discovery:
    """Sum recitals up. Raises DataError where there are none."""
    if not found:
        raise DataError(f"no text has {prefix + suffix} tokens; take a shorter prefix or suffix")
    count, greedy = len(found), sum(one.greedy for one in found)
    within = {n: sum(one.samples() <= n for one in found) / count for n in SAMPLES}
    return Discovery(
        prefix, suffix, count, greedy / count, wilson(greedy, count), within,
        sum(one.strength for one in found) / count, sum(one.exact for one in found) / count,
    )  # fmt: skip


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share."""
    share, square = hits / count, z * z / count
    centre, half = share + square / 2, z * math.sqrt((share * (1 - share) + square / 4) / count)
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))


# --- by free sampling -----------------------------------------------------------------------


@dataclass(frozen=True)
class Extraction:
    """What free samples hold of a corpus."""

    samples: int
    tokens: int
    """New tokens of a sample."""
    window: int
    """Least tokens of a stretch that counts."""
    hits: int
    """Samples with such a stretch; the longest counts."""
    dropped: int
    """Samples whose longest stretch mostly repeats itself."""
    distinct: int
    """Different stretches."""
    unseen: float
    """Good-Turing: the probability that the next hit is a stretch not seen yet; 1 without hits."""
    total: float
    """Chao's lower bound on how many different stretches the model gives."""
    examples: tuple[tuple[str, int], ...]
    """The stretches found most often: text and how often the corpus holds it."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def extract(
    host: Host, index: TokenIndex, *, samples: int, tokens: int, window: int, seed: int = 0,
    top_k: int | None = None, on_samples: OnCount = ignore,
) -> Extraction:  # fmt: skip
    """Sample texts from nothing and look for them in a corpus; one stretch a sample, so that they are independent.

    Raises ConfigError for numbers that are not positive.
    """
    _check(host)
    if min(samples, tokens, window) < 1 or window > tokens:
        raise ConfigError(
            "samples, tokens and window have to be positive, and a window fits into a sample's tokens"
        )
    start = encode_prompt(host.tokenizer, "").ids
    step = max(1, BATCH_TOKENS // tokens)
    found: Counter[tuple[int, ...]] = Counter()
    dropped = 0
    for first in range(0, samples, step):
        count = min(step, samples - first)
        texts = sample_rows(host, [start] * count, tokens, top_k=top_k, seed=seed + first)
        for text in texts:
            ids = host.encode(text, special=False).ids
            spans = index.spans(ids, window)
            if spans:
                begin, end = max(spans, key=lambda span: span[1] - span[0])
                stretch = tuple(ids[begin:end])
                new = len(set(stretch)) >= DISTINCT * len(stretch)
                found.update([stretch] if new else [])
                dropped += not new
        on_samples(first + count, samples)
    common = found.most_common(10)
    examples = tuple((host.decode([list(stretch)])[0], index.count(stretch)) for stretch, _ in common)
    hits = sum(found.values())
    return Extraction(samples, tokens, window, hits, dropped, len(found), *estimates(found), examples)


def estimates(found: Counter[Any]) -> tuple[float, float]:
    """Return the Good-Turing estimate f_1 / n of the mass not seen, and Chao's bound on the number of kinds.

    f_j: kinds seen j times. The bound is S + f_1 (f_1 - 1) / (2 (f_2 + 1)), corrected for bias.
    """
    times = Counter(found.values())
    once, twice, draws = times[1], times[2], sum(found.values())
    return (once / draws if draws else 1.0), len(found) + once * (once - 1) / (2 * (twice + 1))


# --- secrets --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exposure:
    """How far a planted secret comes before others of its kind."""

    secret: str
    rank: int
    """Among the alternatives and itself, by probability; 1 is the most probable."""
    of: int
    exposure: float
    """log2(of) - log2(rank): 0 for the least probable, log2(of) for the first."""


def exposure(host: Host, prompt: str, secret: str, others: Sequence[str]) -> Exposure:
    """Rank a secret behind a prompt among alternatives by its summed log-probability.

    Raises DataError without alternatives.
    """
    _check(host)
    texts = [secret, *dict.fromkeys(one for one in others if one != secret)]
    if len(texts) < 2:
        raise DataError("an exposure needs other secrets of the same kind to rank among")
    logs = log_probabilities(host, [host.encode_answer(prompt, text) for text in texts])
    rank = 1 + int((logs[1:] > logs[0]).sum())
    return Exposure(secret, rank, len(texts), math.log2(len(texts)) - math.log2(rank))


def log_probabilities(host: Host, answers: Sequence[Answer]) -> Tensor:
    """Return the summed log-probability of each answer's tokens, nats ``[n]``.

    Answers that differ in their last token alone share a row.
    """
    sharing: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for i, answer in enumerate(answers):
        sharing.setdefault((answer.ids[:-1], answer.start), []).append(i)
    rows, logs = list(sharing), torch.zeros(len(answers))
    for group in by_length([ids for ids, _ in rows], BATCH_TOKENS):
        places = [(line, at) for line, r in enumerate(group) for at in range(rows[r][1] - 1, len(rows[r][0]))]
        first = {place: number for number, place in enumerate(places)}
        row, at = torch.tensor(places).unbind(1)
        with torch.no_grad():
            scores = (
                host.forward_at(host.batch([rows[r][0] for r in group]), row, at).float().log_softmax(1).cpu()
            )
        for line, r in enumerate(group):
            begin = first[line, rows[r][1] - 1]
            for i in sharing[rows[r]]:
                target = torch.tensor(answers[i].target)
                logs[i] = scores[torch.arange(begin, begin + len(target)), target].sum()
    return logs


def _check(host: Host) -> None:
    if host.kind != CAUSAL:
        raise ConfigError(f"what a model recites is asked of causal language models, and {host.name} is none")
