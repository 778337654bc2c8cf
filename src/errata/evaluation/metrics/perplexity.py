"""Whether a host still models running text: the first thing that collapses under too many edits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from errata.evaluation.metrics import probability


def of_texts(texts: Sequence[Tensor]) -> float:
    """Return the perplexity per token of texts given as log-probabilities ``[tokens]`` each, in nats.

    exp of the mean negative log-probability over the tokens of all texts together, so a long text
    counts more than a short one. Infinite where any number is not finite: a host that overflowed
    models nothing. Raises ValueError where there is no token.
    """
    every = torch.cat([text.double() for text in texts]) if texts else torch.empty(0)
    return probability.perplexity(every.tolist())


def bits_per_byte(texts: Sequence[Tensor], n_bytes: int) -> float:
    """Return the bits that a byte of text costs: -sum of log-probabilities / (ln 2 * bytes).

    Unlike perplexity it does not depend on how a tokenizer cuts, so it compares models. ``n_bytes``: UTF-8
    bytes of the scored text. Infinite where any number is not finite; raises ValueError without bytes.
    """
    if n_bytes <= 0:
        raise ValueError(f"bits per byte of {n_bytes} bytes: expected the UTF-8 length of the scored text")
    total = sum(float(text.double().sum()) for text in texts)
    return -total / (math.log(2) * n_bytes) if math.isfinite(total) else math.inf
