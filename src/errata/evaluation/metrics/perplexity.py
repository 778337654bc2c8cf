"""Perplexity of running text: the first thing that degrades under too many edits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.evaluation.metrics import probability
from errata.evaluation.metrics._metric import Metric, ProbeResult, plain
from errata.types import Row

if TYPE_CHECKING:
    from torch import Tensor

NAME = "perplexity"


def of_texts(texts: Sequence[Tensor]) -> float:
    """Return the perplexity per token of texts given as log-probabilities ``[tokens]`` each, in nats.

    exp of the mean negative log-probability over the tokens of all texts together, so a long text weighs more than a
    short one. Infinite where any number is not finite, as after an overflow. Raises ValueError without tokens.
    """
    return probability.perplexity([value for text in texts for value in text.double().tolist()])


def bits_per_byte(texts: Sequence[Tensor], n_bytes: int) -> float:
    """Return bits per byte of text: -sum of log-probabilities / (ln 2 * bytes).

    Unlike perplexity it does not depend on the tokenizer, so models can be compared. ``texts``: log-probabilities
    ``[tokens]`` of each, in nats; ``n_bytes``: UTF-8 bytes of the scored text. Infinite where any number is not
    finite; raises ValueError without bytes.
    """
    if n_bytes <= 0:
        raise ValueError(f"bits per byte of {n_bytes} bytes: expected the UTF-8 length of the scored text")
    total = sum(float(text.double().sum()) for text in texts)
    return -total / (math.log(2) * n_bytes) if math.isfinite(total) else math.inf


def rows(result: ProbeResult) -> list[Row]:
    """Compute the perplexity of the answer's tokens given the prompt."""
    old, new = result.before.answer_logprobs, result.after.answer_logprobs
    return [result.row(NAME, probability.perplexity(old), probability.perplexity(new), tokens=len(new))]


METRIC = Metric(
    name=NAME,
    label="perplexity",
    title="perplexity of the answer",
    higher_is_better=False,
    forms=frozenset({"span"}),
    rows=rows,
    scores=(
        plain("PPL", "entity.perplexity", order=9),
        plain("PPL.spec", "entity_locality.perplexity", order=9),
    ),
)
