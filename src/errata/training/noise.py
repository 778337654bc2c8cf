"""Answers in prompts some of whose tokens are replaced by vectors, and vectors that make the answers improbable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from errata.host import hooks
from errata.host.host import Host
from errata.host.prefix import ROWS
from errata.training.distil import logits_at
from errata.training.tune import Line, rms


@dataclass(frozen=True, eq=False)
class NoisyLine:
    """A line, and what stands in place of some of its tokens' embeddings."""

    line: Line
    first: int = 0
    """Index of the first token that is replaced."""
    noise: Tensor | None = None
    """Embeddings from there on ``[tokens, d]``; None: none is replaced."""


def noisy_losses(host: Host, lines: Sequence[NoisyLine]) -> Tensor:
    """Return the mean negative log-likelihood per target token of lines on a host as it is now, nats ``[n]``."""
    rows = [(one.line.ids, one.line.at) for one in lines]
    with hooks.on_output(host.model.get_input_embeddings(), _replacer(lines)):
        logits = logits_at(host, rows)
    token = torch.tensor([t for one in lines for t in one.line.targets], device=logits.device)
    losses = functional.cross_entropy(logits, token, reduction="none")
    return torch.stack([part.mean() for part in losses.split([len(one.line.at) for one in lines])])


def _replacer(lines: Sequence[NoisyLine]) -> Callable[[Tensor], Tensor | None]:
    def replace(output: Tensor) -> Tensor | None:  # [rows, columns, d], rows padded on the right
        if all(one.noise is None for one in lines):
            return None
        changed = output.clone()
        for i, one in enumerate(lines):
            if one.noise is not None:
                changed[i, one.first : one.first + len(one.noise)] = one.noise.to(output)
        return changed

    return replace


@dataclass(frozen=True)
class NoisePlan:
    """How noise is learned."""

    steps: int
    rate: float
    """Adam's, in root mean squares of the embeddings."""
    penalty: float
    """Weight of the noise's mean square, in those of the embeddings."""


def learn_noise(
    host: Host, lines: Sequence[tuple[Line, int, int]], plan: NoisePlan, generator: torch.Generator
) -> list[NoisyLine]:
    """Return lines with noise in place of ``tokens`` tokens from ``first`` on that makes their targets improbable.

    ``lines``: each with ``first`` and ``tokens``. Minimised is -NLL + penalty |noise|^2 / (d tokens), from normal
    noise as large as embeddings. Requires a frozen model. Source: UNSIR, Tarun et al., arXiv 2111.08947.
    """
    weight = host.model.get_input_embeddings().weight
    unit = rms(weight)
    found: list[NoisyLine] = []
    for start in range(0, len(lines), ROWS):
        part = lines[start : start + ROWS]
        noise = [
            (unit * torch.randn(tokens, weight.shape[1], generator=generator))
            .to(weight.device).requires_grad_()
            for _, _, tokens in part
        ]  # fmt: skip
        optimizer = torch.optim.Adam(noise, lr=plan.rate * unit)
        noisy = [NoisyLine(line, first, own) for (line, first, _), own in zip(part, noise, strict=True)]
        for _ in range(plan.steps):
            size = torch.stack([own.square().mean() for own in noise]) / unit**2
            loss = (plan.penalty * size - noisy_losses(host, noisy)).sum()
            for own, gradient in zip(noise, torch.autograd.grad(loss, noise), strict=True):
                own.grad = gradient
            optimizer.step()
        found += [NoisyLine(one.line, one.first, own.detach()) for one, own in zip(noisy, noise, strict=True)]
    return found
