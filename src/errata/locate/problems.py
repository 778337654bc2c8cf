"""The optimisation problems of a value search as data: texts, positions, targets, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from errata.errors import RequestError
from errata.host.host import Host
from errata.locate.contexts import Context, shorten
from errata.training.tune import end_token
from errata.types import Request

Token = Literal["last", "first"]
Span = Callable[[Request], tuple[int, int]]
"""Where in a request's text the edited words are, in characters."""


def wide(tensor: Tensor) -> Tensor:
    """Return numbers ``[...]`` in float32 at least: what is solved for is never held in 16 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def subject_span(request: Request) -> tuple[int, int]:
    """Return the subject's place in the text."""
    return request.span


def prompt_end(request: Request) -> tuple[int, int]:
    """Return the place of the prompt's last character that is not a space."""
    end = len(request.text.rstrip())
    return end - 1, end


@dataclass(frozen=True)
class Informed:
    """A row's text behind a statement of its fact."""

    ids: tuple[int, ...]
    """The whole text without the last target token."""
    position: int
    """Index of the edited token in it."""


@dataclass(frozen=True)
class PromptRow:
    """One row: a prompt in one context with its target, or the row that preserves the subject's essence."""

    ids: tuple[int, ...]
    """The text without the last target token; up to the edited token for the essence."""
    position: int
    """Index of the token where the vector is shifted."""
    targets: tuple[int, ...]
    """Target ids; empty for the essence."""
    loss_weight: float
    """Weight in the loss."""
    context: int
    """Number of the context; rows of one context may share a prefix. -1 for the essence."""
    earlier_shifts: tuple[tuple[int, Tensor], ...] = ()
    """Shifts to apply at earlier positions of the row."""
    key_weight: float = 1.0
    """Weight in the mean key."""
    informed: Informed | None = None
    """The same with the fact stated before it, for constraints on inference."""


@dataclass(frozen=True)
class ValueProblem:
    """One vector to find, for one request or for several that share all text up to the edited token."""

    requests: tuple[int, ...]
    """Indices of the requests it serves."""
    rows: tuple[PromptRow, ...]
    """Rows with targets; loss weights of each request's rows sum to one. The first is a bare prompt."""
    essence: PromptRow | None
    """Row whose prediction at the edited token should not change."""
    erased: tuple[PromptRow, ...] = ()
    """Rows whose targets are old answers, to be made improbable; see :func:`with_erased`."""

    @property
    def lines(self) -> tuple[PromptRow, ...]:
        """The rows, under their name of earlier versions."""
        return self.rows

    @property
    def key_rows(self) -> tuple[PromptRow, ...]:
        """One row per context up to the edited token, which is all that the key depends on. Key weights sum to one."""
        first: dict[int, PromptRow] = {}
        for row in self.rows:
            first.setdefault(row.context, row)
        return tuple(replace(row, ids=row.ids[: row.position + 1], targets=()) for row in first.values())


def edited_token(
    host: Host, request: Request, prefix: str = "", *, span: Span = subject_span, token: Token = "last"
) -> tuple[tuple[int, ...], int]:
    """Return the ids of a prompt after a prefix and the index of the edited token in it."""
    start, stop = span(request)
    frame = host.frame(request.text, prefix=prefix, before=start)
    encoding = host.encode(frame.scored, special=frame.special)
    if span is prompt_end and len(frame.scored) > len(request.text) + frame.shift:
        return encoding.ids, len(encoding.ids) - 1  # a cue or template follows the prompt
    find = encoding.last_of if token == "last" else encoding.first_of
    return encoding.ids, find(start + frame.shift, stop + frame.shift)


def value_problems(
    host: Host,
    requests: Sequence[Request],
    contexts: Sequence[Context],
    *,
    span: Span = subject_span,
    token: Token = "last",
    merge: bool = True,
    end: bool = False,
) -> list[ValueProblem]:
    """Return one problem per request, or one for all requests that share their text up to the edited token.

    Such requests have the same key, which can have one value only (MEMIT-Merge, arXiv 2502.07322). ``end``: whether
    the token that ends a text follows each target. Raises ConfigError where the host has none.
    """
    last = (end_token(host),) if end else ()
    groups: dict[object, list[int]] = {}
    for i, request in enumerate(requests):
        ids, position = edited_token(host, request, span=span, token=token)
        groups.setdefault(ids[: position + 1] if merge else i, []).append(i)
    problems = []
    for members in groups.values():
        rows = [
            row
            for i in members
            for row in _rows(host, requests[i], contexts, span=span, token=token, last=last)
        ]
        essence = _essence(host, requests[members[0]], span, token)
        problems.append(ValueProblem(tuple(members), tuple(rows), essence))
    return problems


def with_erased(
    host: Host, requests: Sequence[Request], problems: Sequence[ValueProblem], contexts: Sequence[Context],
    old: Sequence[str], *, span: Span = subject_span, token: Token = "last",
) -> list[ValueProblem]:  # fmt: skip
    """Return problems with rows for the old answers of their requests, by request in ``old``.

    An old answer that is empty, or that the target begins with, cannot be improbable beside it and gets no rows.
    """
    result = []
    for problem in problems:
        rows = list[PromptRow]()
        for i in problem.requests:
            answer = old[i].strip()
            if answer and not requests[i].target.startswith(answer):
                former = replace(requests[i], target=answer)
                rows += _rows(host, former, contexts, span=span, token=token, last=())
        result.append(replace(problem, erased=tuple(rows)))
    return result


def _rows(
    host: Host, request: Request, contexts: Sequence[Context], *, span: Span, token: Token,
    last: tuple[int, ...],
) -> list[PromptRow]:  # fmt: skip
    total = sum(c.weight for c in contexts)
    loss_weight = 1 / len(contexts)  # the authors' code weights contexts in the mean key, not in the loss
    rows = []
    for number, context in enumerate(contexts):
        prefix = shorten(host, context.prefix, request)
        answer = host.encode_answer(request.text, request.target, prefix=prefix, before=span(request)[0])
        _, position = edited_token(host, request, prefix, span=span, token=token)
        if position >= answer.start:
            raise RequestError(f"the subject {request.subject!r} and the target share a token")
        key_weight = context.weight / total
        ids, targets = (*answer.ids, *last)[:-1], (*answer.target, *last)
        rows.append(PromptRow(ids, position, targets, loss_weight, number, key_weight=key_weight))
    return rows


def _essence(host: Host, request: Request, span: Span, token: Token) -> PromptRow:
    start, stop = span(request)
    words = Request("{} is a", request.text[start:stop].strip(), request.target)
    ids, position = edited_token(host, words, token=token)
    return PromptRow(ids[: position + 1], position, (), 1.0, -1)


def group_by_length(lengths: Sequence[int], least: int) -> list[list[int]]:
    """Group indices by length, longest first; lengths with fewer than ``least`` rows share a group.

    Rows of one length need no padding, but small batches use the hardware badly.
    """
    exact: dict[int, list[int]] = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        exact.setdefault(lengths[i], []).append(i)
    groups: list[list[int]] = []
    for rows in exact.values():
        if groups and len(rows) < least and len(groups[-1]) < least:
            groups[-1] += rows
        else:
            groups.append(list(rows))
    return groups


def shared_prefix_lengths(rows: Sequence[PromptRow]) -> dict[int, int]:
    """Return, per context, the length of the prefix that all its rows share before their edited tokens."""
    shared: dict[int, tuple[int, ...]] = {}
    for row in rows:
        before = row.ids[: row.position]
        if row.earlier_shifts:
            before = before[: min(at for at, _ in row.earlier_shifts)]  # a shifted token cannot be shared
        common = shared.get(row.context)
        if common is None:
            shared[row.context] = before
            continue
        length = 0
        while length < min(len(common), len(before)) and common[length] == before[length]:
            length += 1
        shared[row.context] = common[:length]
    return {context: len(ids) for context, ids in shared.items()}


problems = value_problems
"""The function under its name of earlier versions."""
