"""How exposed a secret of several slots is among all that could fill them, and how early its tokens come.

Exposure is log2 of the number of fillings less log2 of the secret's rank among them by probability, Carlini et al.,
arXiv 1802.08232: 0 for the least probable, all bits for the most probable. A secret drawn at random that a model never
read has log2(e) = 1.44 bits in the mean. Ranks are exact: every filling is scored, slot by slot, each beginning once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from errata.errors import DataError
from errata.host.host import Host
from errata.host.tokens import Answer
from errata.inspect.extract import Exposure, log_probabilities

MOST_FILLINGS = 1_000_000
"""Fillings up to which all are scored."""
RANDOM = math.log2(math.e)
"""Mean exposure in bits of a secret that is drawn at random."""


def exact_exposure(host: Host, prompt: str, secret: Sequence[str], alphabet: Sequence[str]) -> Exposure:
    """Rank a secret behind a prompt among all fillings of its slots, each a symbol of the alphabet.

    Symbols are joined by spaces. Raises DataError for a secret with symbols that the alphabet lacks, for more than
    ``MOST_FILLINGS`` fillings, and where the tokenizer joins symbols.
    """
    symbols = list(dict.fromkeys(alphabet))
    missing = [symbol for symbol in secret if symbol not in symbols]
    if missing or not secret or len(symbols) < 2:
        raise DataError(f"the secret {' '.join(secret)!r} needs symbols of an alphabet of two or more")
    fillings = len(symbols) ** len(secret)
    if fillings > MOST_FILLINGS:
        raise DataError(
            f"{fillings} fillings are too many to score, {MOST_FILLINGS} at most: give others to rank among instead"
        )
    base, tokens = _tokens(host, prompt, symbols)
    text = " ".join(secret)
    own = [symbols.index(symbol) for symbol in secret]
    joined = base + tuple(token for i in own for token in tokens[i])
    if host.encode_answer(prompt, text).ids != joined:
        raise DataError(f"the tokenizer joins symbols of {text!r}, so its slots cannot be scored one by one")
    logs, place = _scores(host, base, tokens, len(secret)), 0
    for i in own:
        place = place * len(symbols) + i
    rank = 1 + int((logs > logs[place]).sum())
    return Exposure(text, rank, fillings, math.log2(fillings) - math.log2(rank))


def _tokens(host: Host, prompt: str, symbols: Sequence[str]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Return a prompt's ids and those of each symbol behind it. Raises DataError where the two are joined."""
    rows = [host.encode_answer(prompt, symbol) for symbol in symbols]
    starts = {row.ids[: row.start] for row in rows}
    if len(starts) != 1:
        raise DataError(f"the tokenizer joins {prompt!r} with some symbols, so they cannot be compared")
    return starts.pop(), [row.target for row in rows]


def _scores(host: Host, base: tuple[int, ...], tokens: Sequence[tuple[int, ...]], slots: int) -> Tensor:
    """Return the log-probability of every filling, float64 ``[symbols ** slots]``, the first slot the slowest."""
    logs, prefixes = torch.zeros(1, dtype=torch.float64), [base]
    for _ in range(slots):
        rows = [Answer(prefix + symbol, len(prefix)) for prefix in prefixes for symbol in tokens]
        scores = log_probabilities(host, rows).double()
        logs = (logs[:, None] + scores.view(len(prefixes), len(tokens))).flatten()
        prefixes = [row.ids for row in rows]
    return logs


def reciprocal_rank(host: Host, prompt: str, secret: str) -> float:
    """Return the mean over a secret's tokens of 1 / rank among all tokens, each after the true ones before it: MRR."""
    answer = host.encode_answer(prompt, secret)
    at = torch.arange(answer.start - 1, len(answer.ids) - 1)
    with torch.no_grad():
        logits = host.forward_at(host.batch([answer.ids[:-1]]), torch.zeros_like(at), at).float().cpu()
    own = logits.gather(1, torch.tensor(answer.target)[:, None])
    return float((1 / (1 + (logits > own).sum(1))).mean())


def secret_perplexity(host: Host, prompt: str, secret: str) -> float:
    """Return the perplexity of a secret's tokens behind its prompt."""
    answer = host.encode_answer(prompt, secret)
    return math.exp(-float(log_probabilities(host, [answer])) / len(answer.target))
