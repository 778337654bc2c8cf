"""Scores from probabilities under a forced answer, as the ROME and MEMIT papers report them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mean_logprob(logprobs: Sequence[float]) -> float:
    """Mean log-probability per token of an answer, in nats (minus the papers' per-token NLL)."""
    return sum(logprobs) / len(logprobs)


def prefers(answer: Sequence[float], rival: Sequence[float]) -> bool:
    """Whether an answer is more probable than its rival, per token.

    Over rewrite prompts its mean is ROME's efficacy score ES, over paraphrases PS, over neighbours NS
    (Meng et al. 2022, Sec. 3.4).
    """
    return mean_logprob(answer) > mean_logprob(rival)


def magnitude(answer: Sequence[float], rival: Sequence[float]) -> float:
    """Difference of the two per-token probabilities, in [-1, 1] (ROME's EM, PM, NM)."""
    return math.exp(mean_logprob(answer)) - math.exp(mean_logprob(rival))


def harmonic(scores: Sequence[float]) -> float:
    """Harmonic mean, ROME's S of ES, PS and NS; 0 if any score is 0."""
    if not scores or any(s <= 0 for s in scores):
        return 0.0
    return len(scores) / sum(1 / s for s in scores)


def divergence(before: Tensor, after: Tensor) -> float:
    """KL(before || after) of two next-token distributions given as log-probabilities, in nats."""
    before, after = before.double(), after.double()
    return float((before.exp() * (before - after)).sum().clamp_min(0.0))


def token_accuracy(top: Sequence[bool]) -> float:
    """Share of answer tokens that come first when all tokens before them are given."""
    return sum(top) / len(top)


def exact(top: Sequence[bool]) -> bool:
    """Whether every answer token comes first when all tokens before it are given."""
    return all(top)


def perplexity(logprobs: Tensor) -> float:
    """Exponential of the mean negative log-probability of tokens ``[n]``."""
    return float(torch.exp(-logprobs.double().mean()))
