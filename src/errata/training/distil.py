"""Train a model to predict texts as a teacher does that reads more: KL(teacher || student) at a temperature.

The teacher is the model itself with a context before each text, run once. Kept of its distribution at each token are
the most probable entries and the mass of all others together, so what is compared is a lower bound of the divergence,
and the divergence itself where the vocabulary is no larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.host.host import Host
from errata.host.memory import in_batches
from errata.host.prefix import ROWS


@dataclass(frozen=True)
class Lesson:
    """A text as the student reads it, and as the teacher does behind its context."""

    ids: tuple[int, ...]
    """The text's tokens."""
    at: tuple[int, ...]
    """Indices of the tokens whose predictions are compared."""
    taught_ids: tuple[int, ...]
    """Context and text."""
    taught_at: tuple[int, ...]
    """Indices of the same predictions there."""


@dataclass(frozen=True, eq=False)
class Distribution:
    """Predictions of a teacher as the most probable entries and one for the rest."""

    token: Tensor
    """Int64 ``[t, k]``."""
    logs: Tensor
    """Log-probabilities of those ``[t, k]``."""
    rest: Tensor
    """Log-probability of all other tokens together ``[t]``; -inf where there are none."""


def distribution(logits: Tensor, top: int, temperature: float) -> Distribution:
    """Return predictions at a temperature by their ``top`` most probable entries; ``logits`` ``[t, vocab]``."""
    token = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return _at(logits, token, temperature)


def gap(logits: Tensor, taught: Distribution, temperature: float) -> Tensor:
    """Return KL(teacher || student) times the squared temperature, in nats ``[t]``, from logits ``[t, vocab]``.

    For a high temperature half the mean squared difference of the centred logits.
    """
    own = _at(logits, taught.token, temperature)
    known = (taught.logs.exp() * (taught.logs - own.logs)).sum(1)
    if taught.token.shape[1] == logits.shape[1]:
        return temperature**2 * known
    return temperature**2 * (known + taught.rest.exp() * (taught.rest - own.rest))


def _at(logits: Tensor, token: Tensor, temperature: float) -> Distribution:
    logs = (logits / temperature).log_softmax(1)
    rest = logs.scatter(1, token, float("-inf")).logsumexp(1)
    return Distribution(token, logs.gather(1, token), rest)


class Distillation:
    """The loss of each lesson on a host in its current state, its teacher being the host as it was in the beginning."""

    def __init__(
        self, host: Host, lessons: Sequence[Lesson], *, temperature: float, top: int = 256
    ) -> None:  # fmt: skip
        """Run the teacher once on all lessons. Requires a frozen model."""
        self.host, self.lessons, self.temperature = host, lessons, temperature
        self.taught: list[Distribution] = []

        def run(part: Sequence[Lesson]) -> list[Distribution]:
            logits = logits_at(self.host, [(one.taught_ids, one.taught_at) for one in part])
            return [
                distribution(own, top, temperature) for own in logits.split([len(one.at) for one in part])
            ]

        with torch.no_grad():
            self.taught = in_batches(lessons, ROWS, run)

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Return the mean divergence per token of some lessons, times the squared temperature, nats ``[n]``."""
        part = [self.lessons[i] for i in indices]
        logits = logits_at(self.host, [(one.ids, one.at) for one in part])
        parts = logits.split([len(one.at) for one in part])
        gaps = [gap(own, self.taught[i], self.temperature) for own, i in zip(parts, indices, strict=True)]
        return torch.stack([one.mean() for one in gaps])


def logits_at(host: Host, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """Run rows of token ids; return the logits ``[t, vocab]`` at the places of each, one row's after the other's."""
    row = torch.tensor([i for i, (_, at) in enumerate(rows) for _ in at])
    column = torch.tensor([place for _, at in rows for place in at])
    logits = host.forward_at(host.batch([ids for ids, _ in rows]), row, column)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
