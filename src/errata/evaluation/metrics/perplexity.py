"""Whether a host still models running text: the first thing that collapses under too many edits."""

from __future__ import annotations

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
    if not len(every):
        raise ValueError("perplexity of no tokens: expected at least one text of two tokens")
    if not torch.isfinite(every).all():
        return float("inf")
    return probability.perplexity(every)
