"""What a search for values has to solve, as data: texts, places, targets, weights."""

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
"""Where in a request's text the edited words stand, in characters."""


def subject_span(request: Request) -> tuple[int, int]:
    """Return the subject's place in the text."""
    return request.span


def prompt_end(request: Request) -> tuple[int, int]:
    """Return the place of the prompt's last character that is no space."""
    end = len(request.text.rstrip())
    return end - 1, end


@dataclass(frozen=True)
class Line:
    """One row: a prompt in one context with its target, or the row that keeps the subject's essence."""

    ids: tuple[int, ...]
    """The text up to the one before the last target token; up to the place for the essence."""
    place: int
    """Index of the token where the vector is shifted."""
    targets: tuple[int, ...]
    """Target ids; empty for the essence."""
    weight: float
    """How much it counts in the loss."""
    context: int
    """Rows of like context may begin alike; -1 for the essence."""
    given: tuple[tuple[int, Tensor], ...] = ()
    """Shifts that stand already, at earlier places of the row."""
    share: float = 1.0
    """How much it counts in the key."""


@dataclass(frozen=True)
class Problem:
    """One vector to find, for one request or for several that share all text up to the place."""

    members: tuple[int, ...]
    """Indices of the requests it serves."""
    lines: tuple[Line, ...]
    """Rows with targets; weights of each member's rows sum to one. The first is a bare prompt."""
    essence: Line | None
    """Row whose prediction at the place is to stay."""

    @property
    def places(self) -> tuple[Line, ...]:
        """One row a context, cut after the place: all that decides the key. Shares sum to one."""
        found: dict[int, Line] = {}
        for line in self.lines:
            found.setdefault(line.context, line)
        return tuple(replace(line, ids=line.ids[: line.place + 1], targets=()) for line in found.values())


def place_of(
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


def problems(
    host: Host,
    requests: Sequence[Request],
    contexts: Sequence[Context],
    *,
    span: Span = subject_span,
    token: Token = "last",
    merge: bool = True,
) -> list[Problem]:
    """Lay out one problem a request, or one for all requests that share their text up to the place.

    Such requests have one key, which can hold one value only (MEMIT-Merge, arXiv 2502.07322).
    """
    groups: dict[object, list[int]] = {}
    for i, request in enumerate(requests):
        ids, place = place_of(host, request, span=span, token=token)
        groups.setdefault(ids[: place + 1] if merge else i, []).append(i)
    made = []
    for members in groups.values():
        lines = [
            line for i in members for line in _lines(host, requests[i], contexts, span=span, token=token)
        ]
        essence = _essence(host, requests[members[0]], span, token)
        made.append(Problem(tuple(members), tuple(lines), essence))
    return made


def _lines(
    host: Host, request: Request, contexts: Sequence[Context], *, span: Span, token: Token
) -> list[Line]:
    total = sum(c.weight for c in contexts)
    weight = 1 / len(contexts)  # the authors' code weighs contexts for keys, not in the loss
    lines = []
    for number, context in enumerate(contexts):
        prefix = shorten(host, context.prefix, request)
        answer = host.encode_answer(request.text, request.target, prefix=prefix, before=span(request)[0])
        _, place = place_of(host, request, prefix, span=span, token=token)
        if place >= answer.start:
            raise RequestError(f"the subject {request.subject!r} and the target share a token")
        share = context.weight / total
        lines.append(Line(answer.ids[:-1], place, answer.target, weight, number, share=share))
    return lines


def _essence(host: Host, request: Request, span: Span, token: Token) -> Line:
    start, stop = span(request)
    words = Request("{} is a", request.text[start:stop].strip(), request.target)
    ids, place = place_of(host, words, token=token)
    return Line(ids[: place + 1], place, (), 1.0, -1)


def alike(lengths: Sequence[int], least: int) -> list[list[int]]:
    """Group indices by length, longest first; lengths with fewer than ``least`` rows share a group.

    Rows of one length need no padding, but few rows at a time keep no machine busy.
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


def beginnings(lines: Sequence[Line]) -> dict[int, int]:
    """Return, per context, how many first tokens all its rows share before their places."""
    shared: dict[int, tuple[int, ...]] = {}
    for line in lines:
        before = line.ids[: line.place]
        if line.given:
            before = before[: min(at for at, _ in line.given)]  # a shifted token is a row's own
        known = shared.get(line.context)
        if known is None:
            shared[line.context] = before
            continue
        same = 0
        while same < min(len(known), len(before)) and known[same] == before[same]:
            same += 1
        shared[line.context] = known[:same]
    return {context: len(ids) for context, ids in shared.items()}
