"""Signs of model collapse: n-gram entropy, repetition, perplexity and weight norms.

One edit can break a model (arXiv 2402.09656), and a few thousand usually do; the share of right answers does not show
it. :func:`alarm` combines the signs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.evaluation.metrics.ngrams import distinct, grams, repetition, words

if TYPE_CHECKING:
    from torch import Tensor

LEGACY_WORDS = 100
"""Length of the texts in published entropies, in tokens, including the prompt."""


@dataclass(frozen=True)
class Limits:
    """Thresholds of :func:`alarm`."""

    entropy: float = 500.0
    """GE as printed (times 100) of a text of 100 words; healthy is about 620. Shorter texts: see :func:`alarm`."""
    repetition: float = 0.20
    """Share of 4-grams that repeat an earlier one."""
    perplexity: float = 2.0
    """Perplexity of neutral text, as a multiple of the unedited host's."""
    silence: float = 0.5
    """Share of texts without a word: empty texts have no repetition to measure."""
    norm: float | None = None
    """Norm ratio of a weight; depends on the model, so there is none by default."""


def entropy(text: str, n: int) -> float:
    """Entropy of a text's n-grams in bits, -sum p log2 p over their frequencies; 0 where there is none.

    At most log2 of their number, reached where all n-grams are distinct.
    """
    counts = Counter(grams(words(text), n))
    total = counts.total()
    # + 0.0: a text of one n-gram has entropy 0, not -0
    return -sum(c / total * math.log2(c / total) for c in counts.values()) + 0.0


def generation_entropy(text: str) -> float:
    """GE in bits: (2/3 H_2 + 4/3 H_3) / 2, of one text with its prompt (arXiv 2202.05262, 2210.07229).

    Quirks reproduced: MEMIT's formula has no division by 2, its code has; papers print it times 100
    (:func:`legacy_fluency`). The papers tokenise with NLTK, this with :func:`errata.evaluation.metrics.ngrams.words`,
    which differs in contractions only. It grows with the length of the text: about 6.2 for 100 words.
    """
    return (2 / 3 * entropy(text, 2) + 4 / 3 * entropy(text, 3)) / 2


def legacy_fluency(text: str) -> float:
    """GE as printed in papers: bits times 100; about 620 for 100 words of healthy text."""
    return 100 * generation_entropy(text)


def evenness(text: str) -> float | None:
    """GE over its maximum for a text of this length, in [0, 1]; None below three words.

    1 where all 2-grams are distinct, 0 for a single repeated word; comparable between texts of any length.
    """
    count = len(words(text))
    if count < 3:
        return None
    return generation_entropy(text) / _largest_entropy(count)


def _largest_entropy(count: int) -> float:
    """Return the largest possible GE, in bits, of a text of ``count`` words."""
    return (2 / 3 * math.log2(count - 1) + 4 / 3 * math.log2(count - 2)) / 2


@dataclass(frozen=True)
class Fluency:
    """Averages over open texts; None where no text is long enough."""

    entropy: float | None
    """GE as printed, times 100."""
    evenness: float | None
    distinct: float | None
    """Share of distinct 2-grams."""
    repetition: float | None
    """Share of 4-grams that repeat an earlier one of their text."""


def fluency(texts: Sequence[str]) -> Fluency:
    """Average over texts of three or more words; shorter ones have no trigram."""
    scores = [(text, even) for text in texts if (even := evenness(text)) is not None]
    if not scores:
        return Fluency(None, None, None, None)
    n = len(scores)
    return Fluency(
        entropy=sum(legacy_fluency(text) for text, _ in scores) / n,
        evenness=sum(even for _, even in scores) / n,
        distinct=sum(distinct(text) for text, _ in scores) / n,
        repetition=sum(repetition(text) for text, _ in scores) / n,
    )


def norm_ratio(delta: Tensor, weight: Tensor) -> float:
    """Frobenius norm of a change ``[d_out, d_in]`` over its weight's ``[d_out, d_in]``; infinite on one of zeros."""
    size = float(weight.double().norm())
    return float(delta.double().norm()) / size if size else math.inf


def spectral_ratio(edited: Tensor, weight: Tensor, *, steps: int = 50) -> float:
    """Largest singular value of an edited weight over that of the weight before, both ``[d_out, d_in]``."""
    before = _top_singular(weight, steps)
    return _top_singular(edited, steps) / before if before else math.inf


def _top_singular(matrix: Tensor, steps: int) -> float:
    """Largest singular value by power iteration from the row of largest norm, without random numbers."""
    work = matrix.double()
    vector = work[work.norm(dim=1).argmax()]
    for _ in range(steps):
        image = work.T @ (work @ vector)
        size = float(image.norm())
        if not size or not math.isfinite(size):
            return size
        vector = image / size
    return float((work @ vector).norm())


def alarm(
    texts: Sequence[str],
    *,
    perplexity_ratio: float | None = None,
    norm_ratios: Sequence[float] = (),
    finite: bool = True,
    limits: Limits | None = None,
) -> list[str]:
    """List the signs of collapse of a host, one sentence each; empty if there is none.

    ``texts``: its generations after open prompts. ``finite``: whether all its numbers are finite. GE is bounded by
    the log2 of the number of n-grams, so a short healthy text has less than 500; the limit is therefore converted to
    a share of the bound at 100 words (500 of 662) and compared with :func:`evenness`.
    """
    bounds = limits or Limits()
    scores = fluency(texts)
    reasons = [] if finite else ["its numbers are not finite"]
    share = bounds.entropy / (100 * _largest_entropy(LEGACY_WORDS))
    if scores.evenness is not None and scores.evenness < share:
        reasons.append(
            f"its texts' n-gram entropy is {scores.evenness:.0%} of what their length allows, limit {share:.0%}"
        )
    if scores.repetition is not None and scores.repetition > bounds.repetition:
        reasons.append(f"{scores.repetition:.0%} of its 4-grams are repeated, limit {bounds.repetition:.0%}")
    silent = sum(not words(text) for text in texts)
    if silent > bounds.silence * len(texts):
        reasons.append(f"{silent} of its {len(texts)} texts are empty, limit {bounds.silence:.0%}")
    if perplexity_ratio is not None and not perplexity_ratio <= bounds.perplexity:
        reasons.append(
            f"perplexity is {perplexity_ratio:.3g} times the unedited one, limit {bounds.perplexity:g}"
        )
    if bounds.norm is not None:
        over = [ratio for ratio in norm_ratios if not ratio <= bounds.norm]
        if over:
            reasons.append(
                f"{len(over)} weights have a norm ratio above {bounds.norm:g}, up to {max(over):.3g}"
            )
    return reasons
