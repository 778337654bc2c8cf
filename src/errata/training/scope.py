"""Train a scope classifier: a projection of sentence vectors under which a request is near the prompts in its scope.

Source     Mitchell et al., "Memory-Based Model Editing at Scale", ICML 2022, arXiv 2206.06520, Sec. 3.2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.progress import OnProgress


@dataclass(frozen=True)
class ScopeTraining:
    """Settings of the training."""

    width: int
    """Rows of the projection."""
    steps: int
    """Steps of AdamW."""
    pairs: int
    """Pairs of either sort in a step."""
    learning_rate: float
    """AdamW's."""
    hard: float
    """Share of the pairs out of scope whose prompt is one that the request must not change, rather than another
    request's."""


def train_projection(
    requests: Tensor, inside: Sequence[Tensor], outside: Sequence[Tensor], settings: ScopeTraining, *, seed: int,
    on_progress: OnProgress,
) -> tuple[Tensor, float]:  # fmt: skip
    """Return P ``[width, d]`` that makes p(in scope) = exp(-|P z - P x|^2) right for pairs of request and prompt.

    The loss is the cross-entropy with pairs in scope and out of it in equal parts. ``requests`` ``[n, d]``: the
    requests' vectors; ``inside``, ``outside``: by request, those of its prompts ``[m, d]``. Also returns the last loss.
    """
    generator = torch.Generator().manual_seed(seed)
    near, far = _Prompts(inside), _Prompts(outside)
    weight = torch.randn(settings.width, requests.shape[1], generator=generator)
    spread = (near.vectors - requests[near.owners]) @ weight.mT
    # pairs in scope begin at a distance of 1 on average, whatever the vectors' scale
    weight = (weight / spread.square().sum(1).mean().sqrt().clamp_min(1e-6)).requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=settings.learning_rate)
    count, loss = len(requests), torch.zeros(())
    for step in range(settings.steps):
        one = torch.randint(count, (settings.pairs,), generator=generator)
        close = requests[one] - near.draw(one, generator)
        one = torch.randint(count, (settings.pairs,), generator=generator)
        other = (one + torch.randint(1, count, (settings.pairs,), generator=generator)) % count
        apart = requests[one] - near.draw(other, generator)
        hard = torch.rand(settings.pairs, generator=generator) < settings.hard
        hard &= far.counts[one] > 0
        if bool(hard.any()):
            apart[hard] = requests[one[hard]] - far.draw(one[hard], generator)
        accepted = -(close @ weight.mT).square().sum(1)  # log p, [pairs]
        # at a distance of zero the log of 1 - p would be infinite
        refused = torch.log(-torch.expm1(-(apart @ weight.mT).square().sum(1).clamp_min(1e-6)))
        loss = -accepted.mean() - refused.mean()
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            on_progress("scope classifier", step + 1, settings.steps)
    return weight.detach(), float(loss.detach())


class _Prompts:
    """The prompts of all requests in one matrix."""

    def __init__(self, groups: Sequence[Tensor]) -> None:
        self.vectors = torch.cat(list(groups))
        self.counts = torch.tensor([len(group) for group in groups])
        self.owners = torch.arange(len(groups)).repeat_interleave(self.counts)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, requests: Tensor, generator: torch.Generator) -> Tensor:
        """Return the vector of one prompt of each request, ``[n, d]``."""
        place = torch.rand(len(requests), generator=generator) * self.counts[requests]
        return self.vectors[self.starts[requests] + place.long()]
