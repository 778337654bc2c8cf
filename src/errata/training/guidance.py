"""Train a model on distributions that are given: those of classifier-free guidance, its own, or plain tokens.

Guidance moves a model's prediction away from what it predicts behind one context, the expert's, towards what it
predicts behind another, the novice's. Source: ELM, Gandikota et al., arXiv 2410.02760.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from errata.host.host import Host
from errata.host.memory import in_batches
from errata.host.prefix import ROWS
from errata.training.distil import logits_at
from errata.types import Request


@dataclass(frozen=True, eq=False)
class SoftLine:
    """A text and what is to be predicted in it."""

    ids: tuple[int, ...]
    """Tokens up to the last one that predicts."""
    at: tuple[int, ...]
    """Indices of the tokens that predict."""
    token: Tensor
    """What may follow each, int64 ``[t, k]``."""
    share: Tensor
    """Its probability ``[t, k]``; each row sums to 1."""

    @classmethod
    def hard(cls, ids: Sequence[int], at: Sequence[int], targets: Sequence[int]) -> SoftLine:
        """Return a text with one token to predict at each place."""
        token = torch.tensor(list(targets))[:, None]
        return cls(tuple(ids), tuple(at), token, torch.ones(token.shape))


def guided(
    plain: Tensor, expert: Tensor, novice: Tensor, eta: Tensor, top: int, *, among_plain: bool
) -> tuple[Tensor, Tensor]:
    """Return the tokens ``[t, k]`` and shares ``[t, k]`` of log p - eta (log p_expert - log p_novice), renormalised.

    ``plain``, ``expert`` and ``novice``: log-probabilities ``[t, vocab]``; ``eta`` ``[t]``. Only ``top`` tokens keep
    a share: the largest of that sum, or with ``among_plain`` the most probable ones of ``plain``, which the expert and
    the novice then choose among.
    """
    score = plain - eta[:, None] * (expert - novice)
    token = (plain if among_plain else score).topk(min(top, plain.shape[1]), dim=1).indices
    return token, score.gather(1, token).softmax(1)


class SoftLosses:
    """The divergence of a host in its current state from what lines ask it to predict."""

    def __init__(self, host: Host, lines: Sequence[SoftLine]) -> None:
        self.host, self.lines = host, lines

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Return KL(asked || predicted) of some lines, mean over their places, nats ``[n]``.

        Its gradient is that of the cross-entropy.
        """
        lines = [self.lines[i] for i in indices]
        logits = logits_at(self.host, [(line.ids, line.at) for line in lines])
        parts = logits.log_softmax(1).split([len(line.at) for line in lines])
        return torch.stack([_divergence(own, line) for own, line in zip(parts, lines, strict=True)])


def _divergence(logs: Tensor, line: SoftLine) -> Tensor:
    share = line.share.to(logs)
    own = logs.gather(1, line.token.to(logs.device))
    return (torch.xlogy(share, share) - share * own).sum(1).mean()


# --- what is trained on ---------------------------------------------------------------------


@dataclass(frozen=True)
class Guidance:
    """Both contexts, and how strongly they act."""

    expert: str
    """Placed before a prompt; {text}: the prompt, {subject}, {answer}."""
    novice: str
    eta: tuple[float, float]
    """At the first and the last token, linear between."""
    top: int
    among_plain: bool
    temperature: float

    def contexts(self, answer: Request) -> tuple[str, str, str]:
        """Return what stands before a request's prompt: nothing, the expert's and the novice's context."""
        return "", _filled(self.expert, answer), _filled(self.novice, answer)

    def act(self, logs: Sequence[Tensor], eta: Tensor) -> tuple[Tensor, Tensor]:
        """Return :func:`guided` of the predictions behind each context, log-probabilities ``[t, vocab]``."""
        plain, expert, novice = logs
        return guided(plain, expert, novice, eta.to(plain), self.top, among_plain=self.among_plain)


def _filled(template: str, answer: Request) -> str:
    for slot, text in (("{text}", answer.text), ("{subject}", answer.subject), ("{answer}", answer.target)):
        template = template.replace(slot, text)
    return template


@dataclass(frozen=True)
class _Row:
    """A prompt and its answer behind each context."""

    ids: tuple[tuple[int, ...], ...]
    start: int
    """Index of the answer's first token in the first of them."""

    @property
    def answer(self) -> int:
        """How many tokens the answer has."""
        return len(self.ids[0]) - self.start


def _row(host: Host, answer: Request, guidance: Guidance) -> _Row:
    rows = [
        host.encode_answer(answer.text, answer.target, prefix=context)
        for context in guidance.contexts(answer)
    ]
    return _Row(tuple(row.ids for row in rows), rows[0].start)


def targets(
    host: Host, answers: Sequence[Request], guidance: Guidance, *, every_token: bool = False
) -> list[SoftLine]:
    """Return each answer, a request's target, in its prompt with what is to be predicted there instead.

    Positions are aligned from the right. ``every_token``: also at the prompt's tokens. Requires a frozen model.
    """

    def run(part: Sequence[_Row]) -> list[SoftLine]:
        counts = [
            len(row.ids[0]) - 1 if every_token else min(row.answer, len(row.ids[0]) - 1) for row in part
        ]
        logs = [_from_the_right(host, part, which, counts, guidance.temperature) for which in range(3)]
        lines: list[SoftLine] = []
        for row, count, *own in zip(part, counts, *(one.split(counts) for one in logs), strict=True):
            pair = guidance.act(own, torch.linspace(*guidance.eta, count))
            end = len(row.ids[0]) - 1
            lines.append(SoftLine(row.ids[0][:-1], tuple(range(end - count, end)), *pair))
        return lines

    with torch.no_grad():
        return in_batches([_row(host, answer, guidance) for answer in answers], ROWS, run)


def _from_the_right(
    host: Host, rows: Sequence[_Row], which: int, counts: Sequence[int], temperature: float
) -> Tensor:
    """Return log-probabilities ``[t, vocab]`` of the last so many tokens of each row, behind one of the contexts."""
    ids = [row.ids[which] for row in rows]
    places = [range(len(one) - 1 - count, len(one) - 1) for one, count in zip(ids, counts, strict=True)]
    read = [(one[:-1], tuple(at)) for one, at in zip(ids, places, strict=True)]
    return (logits_at(host, read) / temperature).log_softmax(1)


def continuations(
    host: Host, answers: Sequence[Request], guidance: Guidance, count: int, bridge: str = ""
) -> list[SoftLine]:
    """Return each prompt with ``count`` tokens that the model writes behind it under guidance, as what to predict.

    ``bridge``: a text between them, which is to be predicted too. Draws from PyTorch's global random state. Requires a
    frozen model.
    """
    if not answers:
        return []
    between = host.encode(bridge, special=False).ids if bridge else ()
    found = [_row(host, answer, guidance) for answer in answers]
    rows = [[[*one.ids[which][: -one.answer], *between] for one in found] for which in range(3)]

    def follows(part: Sequence[Sequence[int]]) -> list[Tensor]:
        logits = logits_at(host, [(row, (len(row) - 1,)) for row in part])
        return list((logits / guidance.temperature).log_softmax(1))

    with torch.no_grad():
        for _ in range(count):
            logs = [torch.stack(in_batches(one, ROWS, follows)) for one in rows]
            token, share = guidance.act(logs, torch.full((len(answers),), guidance.eta[1]))
            drawn = token.gather(1, torch.multinomial(share, 1))[:, 0].tolist()
            for one in rows:
                for row, new in zip(one, drawn, strict=True):
                    row.append(new)
    new = len(between) + count
    return [SoftLine.hard(row[:-1], range(len(row) - 1 - new, len(row) - 1), row[-new:]) for row in rows[0]]


def own_predictions(host: Host, texts: Sequence[Sequence[int]], top: int) -> list[SoftLine]:
    """Return texts, token ids of at least two tokens each, with the ``top`` tokens that the model predicts in them.

    Requires a frozen model.
    """

    def run(part: Sequence[Sequence[int]]) -> list[SoftLine]:
        rows = [(tuple(ids[:-1]), tuple(range(len(ids) - 1))) for ids in part]
        logits = logits_at(host, rows).split([len(at) for _, at in rows])
        most = [own.topk(min(top, own.shape[1]), dim=1) for own in logits]
        return [
            SoftLine(*row, own.indices, own.values.softmax(1)) for row, own in zip(rows, most, strict=True)
        ]

    with torch.no_grad():
        return in_batches(texts, ROWS, run)
