"""Train a scope classifier: a projection of sentence vectors under which a request is near the prompts in its scope,
or a head on what is read of a request and a prompt together.

Source     Mitchell et al., "Memory-Based Model Editing at Scale", ICML 2022, arXiv 2206.06520, Sec. 3.2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errata.edits.routers.cross import head_logits
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


@dataclass(frozen=True)
class Pairs:
    """What was read of pairs of a fact and a prompt, by sort, see :func:`errata.host.pairs.read_pairs`."""

    inside: Tensor
    """Prompts in the fact's scope ``[n, d]``."""
    outside: Tensor
    """Prompts that the fact's request must not change ``[m, d]``."""
    others: Tensor
    """Prompts in another fact's scope ``[l, d]``."""


def train_head(
    pairs: Pairs, settings: ScopeTraining, *, seed: int, on_progress: OnProgress
) -> tuple[Tensor, Tensor, float, float]:
    """Return w ``[d]``, P ``[width, d]`` and b that make p(in scope) = sigmoid(b + w h - |P h|^2) right for pairs.

    The loss is the cross-entropy with pairs in scope and out of it in equal parts; also returned, the last one. Of a
    cross-encoder's logits, d = 1, P is empty, and w and b calibrate them.
    """
    generator = torch.Generator().manual_seed(seed)
    width = pairs.inside.shape[1]
    weight = torch.zeros(width) if width > 1 else torch.ones(1)
    projection = torch.randn(settings.width if width > 1 else 0, width, generator=generator)
    if width > 1:  # pairs in scope begin at a distance of 1 on average
        projection /= (pairs.inside @ projection.mT).square().sum(1).mean().sqrt().clamp_min(1e-6)
    bias = torch.ones(()) if width > 1 else torch.zeros(())
    head = [tensor.requires_grad_() for tensor in (weight, projection, bias)]
    optimizer = torch.optim.AdamW(head, lr=settings.learning_rate)
    loss = torch.zeros(())

    def draw(rows: Tensor, count: int) -> Tensor:
        return rows[torch.randint(len(rows), (count,), generator=generator)]

    for step in range(settings.steps):
        hard = int((torch.rand(settings.pairs, generator=generator) < settings.hard).sum())
        hard = 0 if not len(pairs.outside) else settings.pairs if not len(pairs.others) else hard
        apart = [
            draw(rows, count)
            for rows, count in ((pairs.outside, hard), (pairs.others, settings.pairs - hard))
            if count
        ]
        accepted = head_logits(draw(pairs.inside, settings.pairs), weight, projection, bias)
        refused = head_logits(torch.cat(apart), weight, projection, bias)
        loss = functional.softplus(-accepted).mean() + functional.softplus(refused).mean()
        for tensor, gradient in zip(head, torch.autograd.grad(loss, head), strict=True):
            tensor.grad = gradient
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == settings.steps:
            on_progress("scope classifier", step + 1, settings.steps)
    return weight.detach(), projection.detach(), float(bias.detach()), float(loss.detach())
