"""What a search for values has to solve, as data: texts, positions, targets, weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from errata.errors import RequestError
from errata.host.load import Host
from errata.locate.contexts import Context, shorten
from errata.types import Request

Token = Literal["last", "first"]
Span = Callable[[Request], tuple[int, int]]
"""Where in a request's text the edited words are, in characters."""


def subject_span(request: Request) -> tuple[int, int]:
    """Return the subject's place in the text."""
    return request.span


def prompt_end(request: Request) -> tuple[int, int]:
    """Return the place of the prompt's last character that is no space."""
    end = len(request.text.rstrip())
    return end - 1, end


@dataclass(frozen=True)
class PromptRow:
    """One row: a prompt in one context with its target, or the row that preserves the subject's essence."""

    ids: tuple[int, ...]
    """The text up to the one before the last target token; up to the edited token for the essence."""
    position: int
    """Index of the token where the vector is shifted."""
    targets: tuple[int, ...]
    """Target ids; empty for the essence."""
    loss_weight: float
    """How much it counts in the loss."""
    context: int
    """Rows of like context may begin alike; -1 for the essence."""
    earlier_shifts: tuple[tuple[int, Tensor], ...] = ()
    """Shifts already chosen for earlier positions of the row."""
    key_weight: float = 1.0
    """How much it counts in the key."""


@dataclass(frozen=True)
class ValueProblem:
    """One vector to find, for one request or for several that share all text up to the edited token."""

    requests: tuple[int, ...]
    """Indices of the requests it serves."""
    rows: tuple[PromptRow, ...]
    """Rows with targets; loss weights of each request's rows sum to one. The first is a bare prompt."""
    essence: PromptRow | None
    """Row whose prediction at the edited token should not change."""

    @property
    def lines(self) -> tuple[PromptRow, ...]:
        """The rows, under their name of earlier versions."""
        return self.rows

    @property
    def key_rows(self) -> tuple[PromptRow, ...]:
        """One row a context, cut after the edited token: all that decides the key. Key weights sum to one."""
        first: dict[int, PromptRow] = {}
        for row in self.rows:
            first.setdefault(row.context, row)
        return tuple(replace(row, ids=row.ids[: row.position + 1], targets=()) for row in first.values())


def edited_token(
    host: Host, request: Request, prefix: str = "", *, span: Span = subject_span, token: Token = "last"
) -> tuple[tuple[int, ...], int]:
    """Return the ids of a prompt behind a prefix and the index of the edited token in it."""
    start, stop = span(request)
    framed = host.frame(request.text, prefix=prefix, before=start)
    encoded = host.encode(framed.scored, special=framed.special)
    if span is prompt_end and len(framed.scored) > len(request.text) + framed.shift:
        return encoded.ids, len(encoded.ids) - 1  # a cue or template goes on behind the prompt's own end
    find = encoded.last_of if token == "last" else encoded.first_of
    return encoded.ids, find(start + framed.shift, stop + framed.shift)


def value_problems(
    host: Host,
    requests: Sequence[Request],
    contexts: Sequence[Context],
    *,
    span: Span = subject_span,
    token: Token = "last",
    merge: bool = True,
) -> list[ValueProblem]:
    """Return one problem a request, or one for all requests that share their text up to the edited token.

    Such requests have one key, which can hold one value only (MEMIT-Merge, arXiv 2502.07322).
    """
    groups: dict[object, list[int]] = {}
    for i, request in enumerate(requests):
        ids, position = edited_token(host, request, span=span, token=token)
        groups.setdefault(ids[: position + 1] if merge else i, []).append(i)
    problems = []
    for members in groups.values():
        rows = [row for i in members for row in _rows(host, requests[i], contexts, span=span, token=token)]
        essence = _essence(host, requests[members[0]], span, token)
        problems.append(ValueProblem(tuple(members), tuple(rows), essence))
    return problems


def _rows(
    host: Host, request: Request, contexts: Sequence[Context], *, span: Span, token: Token
) -> list[PromptRow]:
    total = sum(c.weight for c in contexts)
    loss_weight = 1 / len(contexts)  # the authors' code weighs contexts for keys, not in the loss
    rows = []
    for number, context in enumerate(contexts):
        prefix = shorten(host, context.prefix, request)
        answer = host.encode_answer(request.text, request.target, prefix=prefix, before=span(request)[0])
        _, position = edited_token(host, request, prefix, span=span, token=token)
        if position >= answer.start:
            raise RequestError(f"the subject {request.subject!r} and the target share a token")
        key_weight = context.weight / total
        rows.append(
            PromptRow(answer.ids[:-1], position, answer.target, loss_weight, number, key_weight=key_weight)
        )
    return rows


def _essence(host: Host, request: Request, span: Span, token: Token) -> PromptRow:
    start, stop = span(request)
    words = Request("{} is a", request.text[start:stop].strip(), request.target)
    ids, position = edited_token(host, words, token=token)
    return PromptRow(ids[: position + 1], position, (), 1.0, -1)


def group_by_length(lengths: Sequence[int], least: int) -> list[list[int]]:
    """Group indices by length, longest first; lengths with fewer than ``least`` rows share a group.

    Rows of one length need no padding, but few rows at a time leave a machine idle.
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
    """Return, per context, how many first tokens all its rows share before their edited tokens."""
    shared: dict[int, tuple[int, ...]] = {}
    for row in rows:
        before = row.ids[: row.position]
        if row.earlier_shifts:
            before = before[: min(at for at, _ in row.earlier_shifts)]  # a shifted token is a row's own
        known = shared.get(row.context)
        if known is None:
            shared[row.context] = before
            continue
        same = 0
        while same < min(len(known), len(before)) and known[same] == before[same]:
            same += 1
        shared[row.context] = known[:same]
    return {context: len(ids) for context, ids in shared.items()}


problems = value_problems
"""The function under its name of earlier versions."""
