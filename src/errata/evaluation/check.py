"""Check an edit: generate an answer to each of its requests and search it for the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from errata.evaluation.metrics import matching
from errata.evaluation.observe import observe
from errata.host.host import Host
from errata.progress import OnCount, ignore
from errata.types import DEFAULT_ASK, AskOptions, Form, Probe, Request

SHORT_TOKENS = 16
"""New tokens of an answer to a short target; a longer target gets more."""
SPARE_TOKENS = 8
"""New tokens beyond those of the target itself, for words that the host generates before it."""


@dataclass(frozen=True)
class RequestCheck:
    """A host's answers to one request, without and with an edit."""

    number: int
    """Number among the edit's requests, counted from 1."""
    request: Request
    before: str
    """The unedited host's answer."""
    after: str
    """The answer with the edit in place."""
    answered: bool
    """Whether the answer ``after`` gives the target, see :func:`errata.evaluation.metrics.matching.answered`."""

    @property
    def name(self) -> str:
        """The request's id, else its number."""
        return self.request.id or str(self.number)


@dataclass(frozen=True)
class EditCheck:
    """The answers to all requests of an edit, by free generation."""

    requests: tuple[RequestCheck, ...]

    @property
    def answered(self) -> int:
        """Number of requests that are answered with their target."""
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
    """Compare answers without and with an edit to the requests' targets; all in the order of the requests."""
    return EditCheck(
        tuple(
            RequestCheck(number, request, _line(old, request), _line(new, request), _gives(new, request))
            for number, (request, old, new) in enumerate(zip(requests, before, after, strict=True), 1)
        )
    )


def answer_requests(
    host: Host, requests: Sequence[Request], *, options: AskOptions = DEFAULT_ASK,
    on_progress: OnCount = ignore,
) -> list[str]:  # fmt: skip
    """Return the greedily generated answer of the host, with the edits in place, to each request.

    Each answer may be as long as its target needs, up to the window. ``options``: how prompts are formatted.
    """
    host.see(requests)
    groups: dict[tuple[Form, int], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(_length(host, request), []).append(i)
    texts = [""] * len(requests)
    completed = 0
    for (form, limit), indices in groups.items():
        start = completed
        probes = [
            # a masked language model needs the number of mask tokens, that of the target's tokens
            Probe(
                "efficacy",
                requests[i].text,
                (requests[i].target,) if host.fills else (),
                (),
                form=form,
                image=requests[i].image,
                more_images=requests[i].more_images,
            )
            for i in indices
        ]
        observations = observe(
            host, probes, replace(options, max_new_tokens=limit, long_tokens=limit),
            on_progress=lambda now, total, start=start: on_progress(start + min(now, total), len(requests)),
        )  # fmt: skip
        for i, observation in zip(indices, observations, strict=True):
            texts[i] = observation.text
        completed += len(indices)
        on_progress(completed, len(requests))
    return texts


def _length(host: Host, request: Request) -> tuple[Form, int]:
    """Return the form of a request's answer and its limit of new tokens, a power of two times :data:`SHORT_TOKENS`.

    A few different lengths only, so that batches are large.
    """
    tokens = len(host.encode_answer(request.text, request.target).target) + SPARE_TOKENS
    limit = SHORT_TOKENS
    while limit < tokens:
        limit *= 2
    return ("long" if _is_long(request.target) else "short"), limit


def _is_long(target: str) -> bool:
    """Return whether a target continues after the end of a line or sentence, where short answers stop."""
    text = target.strip()
    return "\n" in text or matching.first_sentence(text) != text


def _flat(text: str) -> str:
    """Return a text on one line."""
    return " ".join(text.split())


def _line(text: str, request: Request) -> str:
    """Return the part of an answer to show: its first line, or all of a long one on one line."""
    return _flat(text) if _is_long(request.target) else matching.first_answer(text)


def _gives(text: str, request: Request) -> bool:
    if _is_long(request.target):
        text, target = _flat(text), _flat(request.target)
    else:
        target = request.target
    old = request.target_old
    return matching.answered(text, (target,), (old,) if isinstance(old, str) and old else ())
