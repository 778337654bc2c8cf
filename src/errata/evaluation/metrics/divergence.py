"""How far an edit moves the next-token distribution where nothing should move, in nats."""

from __future__ import annotations

import torch
from torch import Tensor


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of two distributions given as log-probabilities ``[vocab]``, in nats.

    A token that p excludes adds nothing; one that only q excludes makes it infinite. NaN stays NaN.
    """
    p, q = p.double(), q.double()
    terms = torch.where(p == -torch.inf, torch.zeros_like(p), p.exp() * (p - q))
    return float(terms.sum().clamp_min(0.0))


def both(before: Tensor, after: Tensor) -> tuple[float, float]:
    """KL(before || after) and KL(after || before), in nats.

    The first grows where the edited model loses what the unedited one would say, the second where it says
    what the unedited one never would.
    """
    return kl(before, after), kl(after, before)


def nkl_legacy(before: Tensor, after: Tensor) -> float:
    """CounterFact+'s NKL in the unit of its tables (arXiv 2305.17553): KL(after || before) / |V|.

    Quirk kept: the paper writes KL(before || after), its code computes the other direction, and averages
    over the vocabulary because it takes the mean over the first dimension of a vector. Times |V| it is
    :func:`kl` in nats.
    """
    return kl(after, before) / before.shape[-1]
