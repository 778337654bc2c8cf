"""Whether an edit did what was asked of it: each request put to the host, its target looked for in the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from errata.evaluation.metrics import matching
from errata.evaluation.observe import observe
from errata.host.load import Host
from errata.types import Form, Probe, Request

SHORT_TOKENS = 16
"""New tokens of an answer to a short target; a longer target gets more."""
SPARE_TOKENS = 8
"""New tokens beyond those of the target itself: what the host puts before it."""


@dataclass(frozen=True)
class RequestCheck:
    """What a host answers to one request, without and with an edit."""

    number: int
    """Place among the edit's requests, counted from 1."""
    request: Request
    before: str
    """The unedited host's answer."""
    after: str
    """The answer with the edit in place."""
    answered: bool
    """Whether that answer gives the target, see :func:`errata.evaluation.metrics.matching.answered`."""

    @property
    def name(self) -> str:
        """The request's id, else its number."""
        return self.request.id or str(self.number)


@dataclass(frozen=True)
class EditCheck:
    """Which requests of an edit are answered with their target by free generation."""

    requests: tuple[RequestCheck, ...]

    @property
    def answered(self) -> int:
        """How many requests are answered with their target."""
        return sum(one.answered for one in self.requests)

    @property
    def missed(self) -> tuple[RequestCheck, ...]:
        """Requests that are not answered with their target."""
        return tuple(one for one in self.requests if not one.answered)

    @property
    def passed(self) -> bool:
        """Whether every request is answered with its target."""
        return not self.missed


def compare_answers(requests: Sequence[Request], before: Sequence[str], after: Sequence[str]) -> EditCheck:
    """Judge the answers to some requests, given without and with an edit, in the order of the requests."""
    return EditCheck(
        tuple(
            RequestCheck(number, request, _line(old, request), _line(new, request), _gives(new, request))
            for number, (request, old, new) in enumerate(zip(requests, before, after, strict=True), 1)
        )
    )


def answer_requests(
    host: Host, requests: Sequence[Request], *, options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:  # fmt: skip
    """Return the host's free answer to each request, as it stands: greedy, in batches of bounded size.

    Each answer may be as long as its target needs, as far as the window goes. ``options``: those of
    :func:`errata.evaluation.observe.observe`.
    """
    given = {name: value for name, value in (options or {}).items() if name != "max_new_tokens"}
    groups: dict[tuple[Form, int], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(_length(host, request), []).append(i)
    texts = [""] * len(requests)
    done = 0
    for (form, limit), places in groups.items():
        start = done
        probes = [
            # a model that fills masks is told how many the target takes
            Probe("efficacy", requests[i].text, (requests[i].target,) if host.fills else (), (), form=form)
            for i in places
        ]
        found = observe(
            host, probes, max_new_tokens=limit, long_tokens=limit,
            on_progress=lambda now, total, start=start: on_progress(start + min(now, total), len(requests)), **given,
        )  # fmt: skip
        for i, one in zip(places, found, strict=True):
            texts[i] = one.text
        done += len(places)
        on_progress(done, len(requests))
    return texts


def _length(host: Host, request: Request) -> tuple[Form, int]:
    """Return the form of a request's answer and its new tokens, doubled from :data:`SHORT_TOKENS` on.

    Few different lengths keep requests together in batches.
    """
    tokens = len(host.encode_answer(request.text, request.target).target) + SPARE_TOKENS
    limit = SHORT_TOKENS
    while limit < tokens:
        limit *= 2
    return ("long" if _is_long(request.target) else "short"), limit


def _is_long(target: str) -> bool:
    """Whether a target goes on behind the end of a line or sentence, where short answers stop."""
    text = target.strip()
    return "\n" in text or matching.first_sentence(text) != text


def _flat(text: str) -> str:
    """Put a text on one line."""
    return " ".join(text.split())


def _line(text: str, request: Request) -> str:
    """Return what of an answer is shown: its first line, or all of a long one on one line."""
    return _flat(text) if _is_long(request.target) else matching.first_answer(text)


def _gives(text: str, request: Request) -> bool:
    if _is_long(request.target):
        text, target = _flat(text), _flat(request.target)
    else:
        target = request.target
    old = request.target_old
    return matching.answered(text, (target,), (old,) if isinstance(old, str) and old else ())
