"""Scores from probabilities under a forced answer, as the ROME and MEMIT papers report them.

An answer is given as the log-probabilities of its tokens, in nats. The papers score its mean per token:
exp of that is a geometric mean and no probability of the answer, and it favours long answers whose later
tokens follow from the first. The summed variant is the probability itself; it favours short ones.
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
    """Geometric mean of an answer's token probabilities, in [0, 1]: what the papers call P(answer)."""
    return math.exp(mean_logprob(logprobs))


def magnitude(answer: Sequence[float], rival: Sequence[float], *, summed: bool = False) -> float:
    """Difference of the two probabilities, in [-1, 1]: ROME's EM, PM, NM per token, or ``summed``."""
    if summed:
        return math.exp(sum(answer)) - math.exp(sum(rival))
    return per_token(answer) - per_token(rival)


def most_probable(choices: Sequence[Sequence[float]], *, summed: bool = False) -> int | None:
    """Index of the most probable of several answers, the first of equals; None where none has a number.

    Entity Inferences takes the label of highest likelihood (arXiv 2305.01651).
    """
    scores = [sum(choice) if summed else mean_logprob(choice) for choice in choices]
    ranked = [score for score in scores if not math.isnan(score)]
    return scores.index(max(ranked)) if ranked else None


def harmonic(scores: Sequence[float]) -> float:
    """Harmonic mean, ROME's S of ES, PS and NS; 0 if any score is 0."""
    if not scores or any(s <= 0 for s in scores):
        return 0.0
    return len(scores) / sum(1 / s for s in scores)


def legacy_score(shares: Sequence[float]) -> float:
    """ROME's S as its summary prints it, in per cent, of shares in [0, 1].

    Quirk kept: each share is first turned into per cent and rounded to two digits, and S is rounded again,
    so it can differ from :func:`harmonic` in the second digit.
    """
    return round(harmonic([round(100 * share, 2) for share in shares]), 2)


def token_accuracy(top: Sequence[bool]) -> float:
    """Share of answer tokens that come first when all tokens before them are given.

    EasyEdit's rewrite, rephrase and portability accuracy, and zsRE's scores in the ROME code. Quirk: the
    true beginning is fed, so part of the answer and its length are given away, and a shared token earns
    credit.
    """
    return sum(top) / len(top)


def exact(top: Sequence[bool]) -> bool:
    """Whether every answer token comes first when all tokens before it are given (MEND's edit success)."""
    return all(top)


def perplexity(logprobs: Sequence[float] | Tensor) -> float:
    """Exponential of the mean negative log-probability of tokens ``[n]``, in nats.

    Infinite where a number is not finite. Raises ValueError of no tokens.
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
