"""Rehearse requests beside running text, so that a change keeps what the unedited model says of the text.

Each round takes some requests and some texts and makes one Polyak step on the requests' loss plus a multiple of
the texts' divergence from the unedited model. A model that answers all requests and says of every text what it
said before has a loss of zero, so zero is the loss to reach. The change may be any matrix; the step is the gradient
times M^-1, the steepest one under the cost of change M.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.errors import ConfigError
from errata.host import hooks
from errata.host.host import Host
from errata.host.layout import Site
from errata.host.memory import in_batches
from errata.host.prefix import ComputedRows, Prefix, PrefixRunner, plain_prefix
from errata.host.tokens import Batch
from errata.linalg.solve import CostMatrix
from errata.progress import OnCount, ignore
from errata.training.gradients import sum_gradients
from errata.training.tune import ROWS, Line, Losses, beside

TOP = 64
"""Next tokens that are told apart when two distributions are compared; the others count as one."""


GROWTH = 2.0
"""How much the rate may grow from one step to the next, so that a round with a flat loss does not throw the change
far away (Loizou et al., AISTATS 2021, arXiv 2002.10542)."""


@dataclass(frozen=True)
class Recital:
    """What a host says next at every token of some texts: its most probable tokens."""

    rows: Sequence[tuple[int, ...]]
    """Ids of each text."""
    tokens: Sequence[Tensor]
    """Of each text ``[tokens, k]``: the most probable next tokens."""
    logprobs: Sequence[Tensor]
    """Their log-probabilities ``[tokens, k]``."""


@dataclass(frozen=True)
class Round:
    """What one step looks at, by index."""

    lines: Sequence[int]
    texts: Sequence[int]

    def renumbered(self, lines: Mapping[int, int], texts: Mapping[int, int]) -> Round:
        """Return the round under other numbers."""
        return Round([lines[i] for i in self.lines], [texts[i] for i in self.texts])


def draw(
    rng: random.Random, *, new: int, earlier: int, texts: int, passes: int, size: int, beside: int
) -> list[Round]:
    """Draw rounds in which each new request comes ``passes`` times, with earlier requests and texts.

    Lines are numbered with the earlier ones first. ``size``: requests a round, at most half of them new where
    there are earlier ones. ``beside``: texts a round.
    """
    fresh = min(new, max(1, size // 2) if earlier else size)
    rounds, deck = [], list[int]()
    for _ in range(-(-passes * new // fresh)):
        if len(deck) < fresh:
            deck += rng.sample(range(earlier, earlier + new), new)
        repeats = rng.sample(range(earlier), min(earlier, size - fresh))
        rounds.append(Round([*deck[:fresh], *repeats], rng.sample(range(texts), min(texts, beside))))
        deck = deck[fresh:]
    return rounds


@torch.no_grad()
def recite(host: Host, rows: Sequence[tuple[int, ...]], *, top: int = TOP, batch: int = ROWS) -> Recital:
    """Return the host's current next-token distributions at every token of some texts."""
    runner = PrefixRunner(host)

    def run(part: Sequence[tuple[int, ...]]) -> list[tuple[Tensor, Tensor]]:
        logprobs = _next_logprobs(runner, part, host.batch(list(part)), plain_prefix())
        best = logprobs.topk(min(top, logprobs.shape[1] - 1), dim=1)
        lengths = [len(row) for row in part]
        return list(zip(best.indices.split(lengths), best.values.split(lengths), strict=True))

    top_tokens = in_batches(rows, batch, run)
    return Recital(rows, [tokens for tokens, _ in top_tokens], [logprobs for _, logprobs in top_tokens])


def divergence(now: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Return KL(before || now) ``[t]`` in nats, with all tokens but the most probable ones before as one.

    ``now`` ``[t, vocab]``: log-probabilities; ``tokens`` and ``logprobs`` ``[t, k]``: those before. Never above the
    divergence of the whole distributions, and zero where they are equal.
    """
    rest_before = (1 - logprobs.exp().sum(1)).clamp_min(0)
    rest_now = now.scatter(1, tokens, -torch.inf).logsumexp(1)
    divergence_of_top = (logprobs.exp() * (logprobs - now.gather(1, tokens))).sum(1)
    return divergence_of_top + torch.special.xlogy(rest_before, rest_before) - rest_before * rest_now


def rehearse_(
    host: Host, changes: Mapping[Site, Tensor], lines: Sequence[Line], recital: Recital,
    rounds: Sequence[Round], costs: Mapping[Site, CostMatrix], *, weight: float, limit: float | None = None,
    batch: int | None = None, tick: OnCount = ignore,
) -> dict[str, float]:  # fmt: skip
    """Change ``changes`` ``[d_out, d_in]`` in place by one step a round; return the last round's losses.

    ``weight``: of the texts' divergence, nats per token, beside the requests' mean loss. ``limit``: longest step,
    in norms under the costs. ``batch``: rows run at once. Raises ConfigError when the loss stops being a number.
    """
    for change in changes.values():
        change.requires_grad_(True)
    loss, drift, rate = 0.0, 0.0, float("inf")
    with hooks.frozen(host.model):
        measure = _Measure(host, lines, recital, changes, batch or ROWS)
        for number, one in enumerate(rounds):
            tick(number, len(rounds))
            loss, gradients = measure.of_lines(one.lines)
            drift, more = measure.of_texts(one.texts)
            for gradient, other in zip(gradients, more, strict=True):
                gradient += weight * other
            total = loss + weight * drift
            if not torch.isfinite(torch.tensor(total)):
                raise ConfigError(f"the loss is {total} after {number} rounds; load the model in float32")
            rate = GROWTH * _step_(changes, gradients, costs, total, rate=rate, limit=limit)
    for change in changes.values():
        change.requires_grad_(False)
    return {"rehearsed_loss": loss, "divergence": drift}


@torch.no_grad()
def _step_(
    changes: Mapping[Site, Tensor], gradients: Sequence[Tensor], costs: Mapping[Site, CostMatrix], loss: float,
    *, rate: float, limit: float | None,
) -> float:  # fmt: skip
    """Go along the gradients times M^-1 to where the loss would be zero if it were linear; return the rate taken.

    ``rate``: the highest one, per unit of the gradients.
    """
    natural = [costs[site].solve(g.cpu().mT).mT.to(g) for site, g in zip(changes, gradients, strict=True)]
    square = sum(float((g.double() * n.double()).sum()) for g, n in zip(gradients, natural, strict=True))
    if square <= 0.0:
        return rate
    rate = min(loss / square, rate, float("inf") if limit is None else limit / square**0.5)
    for change, direction in zip(changes.values(), natural, strict=True):
        change -= rate * direction
    return rate


def _next_logprobs(
    runner: PrefixRunner, rows: Sequence[Sequence[int]], batch: Batch, prefix: Prefix
) -> Tensor:
    """Return log-probabilities of the next token at every token of some rows ``[tokens, vocab]``."""
    row = torch.tensor([i for i, ids in enumerate(rows) for _ in ids])
    at = torch.tensor([t for ids in rows for t in range(len(ids))])
    logits = runner.run(batch, prefix, at=(row, at + batch.offset.cpu()[row])).logits
    assert logits is not None
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)


class _Measure:
    """Losses with changes beside their sites, and the gradients for the changes."""

    def __init__(
        self, host: Host, lines: Sequence[Line], recital: Recital, changes: Mapping[Site, Tensor], batch: int
    ) -> None:
        depth = min(site.layer for site in changes)
        self.host, self.changes, self.recital, self.batch = host, changes, recital, batch
        self.losses = Losses(host, lines, depth=depth)
        self.computed = ComputedRows(host, recital.rows, depth)

    def of_lines(self, indices: Sequence[int]) -> tuple[float, list[Tensor]]:
        """Return the mean loss of some requests in nats per target token, and its gradients."""
        return self._sum(indices, lambda part: self.losses(part).sum() / len(indices))

    def of_texts(self, indices: Sequence[int]) -> tuple[float, list[Tensor]]:
        """Return the mean divergence of some texts in nats per token, and its gradients."""
        count = sum(len(self.recital.rows[i]) for i in indices)

        def part_of(part: Sequence[int]) -> Tensor:
            rows = [self.recital.rows[i] for i in part]
            batch, prefix = self.computed.select(part)
            now = _next_logprobs(self.computed.runner, rows, batch, prefix)
            tokens = torch.cat([self.recital.tokens[i] for i in part])
            logprobs = torch.cat([self.recital.logprobs[i] for i in part])
            return divergence(now, tokens.to(now.device), logprobs.to(now)).sum() / count

        return self._sum(indices, part_of)

    def _sum(
        self, indices: Sequence[int], part_of: Callable[[Sequence[int]], Tensor]
    ) -> tuple[float, list[Tensor]]:
        """Return a loss that is a sum over items, and its gradients, run in batches."""

        def loss_of(part: Sequence[int]) -> tuple[Tensor, list[float]]:
            with beside(self.host, self.changes):
                loss = part_of(part)
            return loss, [float(loss.detach()) / len(part)] * len(part)

        losses, gradients = sum_gradients(indices, list(self.changes.values()), loss_of, batch=self.batch)
        return sum(losses), gradients
