"""Constraints of a value search on inference: what the edited model makes of its new fact, the unedited one makes of it
when it reads it.

Source Zhang et al., "Uncovering Overfitting in Large Language Model Editing", ICLR 2025, arXiv 2410.07819 ("Learn the
Inference"). The teacher is the model without the edit, with the fact stated before the same text. Compared are what
the edited token's state says at a later layer, read with the model's own norm and head, and the distributions that
the target is predicted by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.host import hooks
from errata.host.host import Host
from errata.host.memory import in_batches
from errata.host.prefix import ROWS, PrefixRunner, plain_prefix
from errata.host.tokens import Side
from errata.locate.contexts import Context, shorten
from errata.locate.problems import Informed, PromptRow, Span, Token, ValueProblem, edited_token, subject_span
from errata.types import Request

Direction = Literal["edited", "unedited"]


@dataclass(frozen=True)
class Inference:
    """Weights of the constraints."""

    layer: int
    """The later layer at whose output the edited token's state is read; above the layer whose value is searched."""
    subject: float
    """Weight of the divergence of what is read there, mean over contexts."""
    output: float
    """Weight of the divergence of the predictions of the target, mean over contexts and target tokens."""
    direction: Direction = "edited"
    """``edited``: KL(edited || unedited with the fact in context); ``unedited``: the other way round."""


def divergence(edited: Tensor, unedited: Tensor, direction: Direction) -> Tensor:
    """Return the KL divergence of log-probabilities ``[n, vocab]`` in nats ``[n]``; see :class:`Inference`."""
    first, second = (edited, unedited) if direction == "edited" else (unedited, edited)
    return (first.exp() * (first - second)).sum(-1)


def informed(
    host: Host, requests: Sequence[Request], problems: Sequence[ValueProblem], contexts: Sequence[Context],
    facts: Sequence[str], *, span: Span = subject_span, token: Token = "last",
) -> list[ValueProblem]:  # fmt: skip
    """Return problems whose rows know their text behind a statement of the fact, by request in ``facts``.

    ``problems`` are those of the same requests and contexts. A context is left out behind a statement where both do
    not fit into the window. Raises RequestError where the statement itself does not, or joins a token of the text.
    """
    result = []
    for problem in problems:
        rows = list[PromptRow]()
        for k, row in enumerate(problem.rows):
            i = problem.requests[k // len(contexts)]
            context = contexts[row.context]
            rows.append(
                replace(row, informed=_informed(host, requests[i], row, facts[i], context, span, token))
            )
        result.append(replace(problem, rows=tuple(rows)))
    return result


def _informed(
    host: Host, request: Request, row: PromptRow, fact: str, context: Context, span: Span, token: Token
) -> Informed:
    texts = [fact + shorten(host, context.prefix, request), fact]
    for prefix in dict.fromkeys(texts):
        answer = host.encode_answer(request.text, request.target, prefix=prefix, before=span(request)[0])
        target = answer.target
        if target != row.targets[: len(target)]:
            raise RequestError(
                f"the target {request.target!r} has other tokens behind {prefix!r:.80} than behind the prompt alone"
            )
        ids = (*answer.ids, *row.targets[len(target) :])[:-1]
        if host.window is None or len(ids) <= host.window:
            return Informed(ids, edited_token(host, request, prefix, span=span, token=token)[1])
    raise RequestError(
        f"{fact!r:.80} and the prompt {request.text!r:.80} together are longer than the model's window of {host.window}"
    )


@dataclass(frozen=True, eq=False)
class Taught:
    """What the unedited model gives of some rows with their facts in its context, as log-probabilities."""

    subject: Tensor | None
    """Of the edited token's state at the later layer ``[rows, vocab]``; None where it is not compared."""
    output: Tensor | None
    """Of the predictions of all target tokens, row by row ``[n, vocab]``; None where they are not compared."""

    def select(self, rows: Tensor, predictions: Tensor) -> Taught:
        """Return those of some rows; ``rows`` indices ``[m]``, ``predictions`` a mask over all predictions ``[n]``."""
        return Taught(
            None if self.subject is None else self.subject[rows],
            None if self.output is None else self.output[predictions],
        )

    def terms(
        self, runner: PrefixRunner, weights: Inference, logits: Tensor, states: Tensor | None, row: Tensor,
        share: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the weighted sum of both divergences of each row ``[rows]``, from what the edited model gives.

        ``logits`` ``[n, vocab]`` of the predictions, each of a ``row`` and of a ``share`` ``[n]`` in the loss;
        ``states`` ``[rows, d]`` of the edited tokens at the later layer.
        """
        total, share = logits.new_zeros(int(row.max()) + 1), share.to(logits)
        if self.output is not None:
            gap = divergence(logits.log_softmax(-1), self.output, weights.direction)
            total = total.index_add(0, row, weights.output * gap * share)
        if self.subject is not None and states is not None:
            read = runner.head(states).log_softmax(-1).to(logits.device)
            gap = divergence(read, self.subject, weights.direction)
            total = total + weights.subject * gap * torch.zeros_like(total).index_add(0, row, share)
        return total


@torch.no_grad()
def teach(
    runner: PrefixRunner, rows: Sequence[PromptRow], weights: Inference, *, side: Side = "right"
) -> Taught:
    """Run rows with their facts in context on the model as it is; needs rows of :func:`informed`.

    ``side``: where shorter rows are padded, which changes nothing.
    """
    host = runner.host

    def run(part: Sequence[PromptRow]) -> list[tuple[Tensor | None, Tensor | None]]:
        texts = [row.informed for row in part if row.informed is not None]
        assert len(texts) == len(part)
        batch = host.batch([text.ids for text in texts], side=side)
        offset = batch.offset.tolist()
        counts = [len(row.targets) for row in part]
        line = [i for i, count in enumerate(counts) for _ in range(count)]
        column = [
            offset[i] + len(text.ids) - count + j
            for i, (text, count) in enumerate(zip(texts, counts, strict=True))
            for j in range(count)
        ]
        at = torch.tensor(line, device=host.device), torch.tensor(column, device=host.device)
        ran = runner.run(batch, plain_prefix(), at=at, keep=[weights.layer])
        assert ran.logits is not None
        logits = ran.logits.to(torch.promote_types(ran.logits.dtype, torch.float32))
        outputs = logits.log_softmax(-1).split(counts)
        states = ran.states[weights.layer]
        places = torch.tensor([start + text.position for start, text in zip(offset, texts, strict=True)])
        own = states[torch.arange(len(part), device=states.device), places.to(states.device)]
        read = runner.head(own).log_softmax(-1).to(host.device) if weights.subject else None
        return [
            (None if read is None else read[i], outputs[i] if weights.output else None)
            for i in range(len(part))
        ]

    with hooks.frozen(host.model):
        found = in_batches(rows, ROWS, run)
    subjects = [subject for subject, _ in found if subject is not None]
    outputs = [output for _, output in found if output is not None]
    return Taught(torch.stack(subjects) if subjects else None, torch.cat(outputs) if outputs else None)
