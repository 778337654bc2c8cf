"""Whether an edited host says the new target where it is wrong: CounterFact+ and EVOKE.

CounterFact+ (arXiv 2305.17553) states the edit before a neighbour's prompt; NS+ and NM+ are NS and NM
there. EVOKE (arXiv 2410.07819) asks questions whose right answer is neither the new target nor, in the
recall tasks, the original one. Probabilities are per token, as in the code both build on, see
:mod:`errata.evaluation.metrics.probability`. Each function takes what one probe or a list of probes gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from errata.evaluation.metrics import probability

Answer = Sequence[float]
"""Log-probabilities of an answer's tokens, in nats."""


@dataclass(frozen=True)
class Overfit:
    """EVOKE's averages over prompts, all in [0, 1]."""

    cap: float
    """CAP: probability of the correct answer, more is better."""
    dp: float
    """DP: direct probability of the edit's target, which is wrong here, less is better."""
    eos: float
    """EOS, editing overfit score: share of prompts where the correct answer beats the edit's target."""


@dataclass(frozen=True)
class Recall:
    """EVOKE's averages over prompts that ask for the edit itself, all in [0, 1]."""

    cap: float
    """CAP: probability of the correct answer, here the edit's target."""
    oap: float
    """OAP: probability of the original answer."""
    ams: float
    """AMS, answer modify score: share of prompts where the correct answer beats the original one."""


def overfit(correct: Sequence[Answer], target: Sequence[Answer]) -> Overfit:
    """Average prompts where the edit's target is wrong: :class:`Overfit`. Raises ValueError of none."""
    cap, dp, eos = _averages(correct, target)
    return Overfit(cap, dp, eos)


def recall(correct: Sequence[Answer], original: Sequence[Answer]) -> Recall:
    """Average prompts where the answer must have changed: :class:`Recall`. Raises ValueError of none."""
    cap, oap, ams = _averages(correct, original)
    return Recall(cap, oap, ams)


def specificity(kept: Sequence[Sequence[Answer]], target: Sequence[Sequence[Answer]]) -> tuple[float, float]:
    """NS+ and NM+ of cases of prompts that state the edit first: averaged inside a case, then over cases.

    On plain neighbours the same two numbers are NS and NM. Raises ValueError without a case.
    """
    if not kept:
        raise ValueError("no cases: expected the prompts of at least one")
    shares, margins = [], []
    for answers, rivals in zip(kept, target, strict=True):
        pairs = list(zip(answers, rivals, strict=True))
        shares.append(sum(probability.prefers(a, r) for a, r in pairs) / len(pairs))
        margins.append(sum(probability.magnitude(a, r) for a, r in pairs) / len(pairs))
    return sum(shares) / len(shares), sum(margins) / len(margins)


def _averages(correct: Sequence[Answer], other: Sequence[Answer]) -> tuple[float, float, float]:
    pairs = list(zip(correct, other, strict=True))
    if not pairs:
        raise ValueError("no prompts: expected the log-probabilities of at least one")
    n = len(pairs)
    return (
        sum(probability.per_token(a) for a, _ in pairs) / n,
        sum(probability.per_token(b) for _, b in pairs) / n,
        sum(probability.prefers(a, b) for a, b in pairs) / n,
    )
