"""Scores from token probabilities under teacher forcing, as reported in the ROME and MEMIT papers.

An answer is given as the log-probabilities of its tokens, in nats. The papers score their mean per token: its
exponential is a geometric mean, not the answer's probability, and favours long answers with predictable later tokens.
The summed variant is the probability itself and favours short answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def mean_logprob(logprobs: Sequence[float]) -> float:
    """Mean log-probability per token of an answer, in nats (minus the papers' per-token NLL)."""
    return sum(logprobs) / len(logprobs)


def prefers(answer: Sequence[float], rival: Sequence[float], *, summed: bool = False) -> bool:
    """Whether an answer is more probable than its rival, per token or ``summed``.

    Over rewrite prompts its mean is ROME's efficacy score ES, over paraphrases PS, over neighbours NS
    (Meng et al. 2022, Sec. 3.4); over prompts that state the edit first it is NS+ (arXiv 2305.17553).
    """
    if summed:
        return sum(answer) > sum(rival)
    return mean_logprob(answer) > mean_logprob(rival)


def per_token(logprobs: Sequence[float]) -> float:
    """Geometric mean of an answer's token probabilities, in [0, 1]; called P(answer) in the papers."""
    return math.exp(mean_logprob(logprobs))


def magnitude(answer: Sequence[float], rival: Sequence[float], *, summed: bool = False) -> float:
    """Difference of the two probabilities, in [-1, 1]: ROME's EM, PM, NM per token, or ``summed``."""
    if summed:
        return math.exp(sum(answer)) - math.exp(sum(rival))
    return per_token(answer) - per_token(rival)


def most_probable(choices: Sequence[Sequence[float]], *, summed: bool = False) -> int | None:
    """Index of the most probable of several answers, the first of ties; None where all are NaN.

    Entity Inferences takes the label of highest likelihood (arXiv 2305.01651).
    """
    scores = [sum(choice) if summed else mean_logprob(choice) for choice in choices]
    finite = [score for score in scores if not math.isnan(score)]
    return scores.index(max(finite)) if finite else None


def harmonic(scores: Sequence[float]) -> float:
    """Harmonic mean, ROME's S of ES, PS and NS; 0 if any score is 0."""
    if not scores or any(s <= 0 for s in scores):
        return 0.0
    return len(scores) / sum(1 / s for s in scores)


def legacy_score(shares: Sequence[float]) -> float:
    """ROME's S as printed by its code, in per cent, from shares in [0, 1].

    Quirk reproduced: each share is first converted to per cent and rounded to two digits, and S is rounded again,
    so it can differ from :func:`harmonic` in the second digit.
    """
    return round(harmonic([round(100 * share, 2) for share in shares]), 2)


def token_accuracy(top: Sequence[bool]) -> float:
    """Share of answer tokens that are the argmax given the true tokens before them.

    EasyEdit's rewrite, rephrase and portability accuracy, and zsRE's scores in the ROME code. Quirk: teacher forcing
    gives away the beginning and the length of the answer, and a token shared by both answers earns credit.
    """
    return sum(top) / len(top)


def exact(top: Sequence[bool]) -> bool:
    """Whether every answer token is the argmax given the true tokens before it (MEND's edit success)."""
    return all(top)


def perplexity(logprobs: Sequence[float] | Tensor) -> float:
    """Exponential of the mean negative log-probability of tokens ``[n]``, in nats.

    Infinite where a number is not finite. Raises ValueError without tokens.
    """
    values = [float(value) for value in logprobs]
    if not values:
        raise ValueError("perplexity of no tokens: expected at least one text of two tokens")
    if not all(map(math.isfinite, values)):
        return math.inf
    try:
        return math.exp(-math.fsum(values) / len(values))
    except OverflowError:
        return math.inf  # beyond a double
