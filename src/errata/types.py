"""Frozen records that every room uses. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from errata.errors import RequestError

SLOT = "{}"


@dataclass(frozen=True)
class Request:
    """What to change: complete ``prompt`` about ``subject`` with ``target`` from now on.

    Raises :class:`RequestError` when a field is empty, when the subject does not stand in the
    prompt, or when it stands there more than once and no ``{}`` says which one is meant.
    """

    prompt: str
    """A sentence up to the answer; ``{}`` marks the subject, or the subject stands there itself."""
    subject: str
    """The entity the fact is about, spelled as in the prompt."""
    target: str
    """The answer the model is to give, without leading space."""
    target_old: str | None = None
    """The answer it gives now, where known."""
    id: str | None = None
    """A name for messages and tables."""

    def __post_init__(self) -> None:
        problems = request_problems(self.prompt, self.subject, self.target)
        if problems:
            name = f"request {self.id!r}: " if self.id else ""
            raise RequestError(name + "; ".join(problems))

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        head, tail = self.template
        return head + self.subject + tail

    @property
    def template(self) -> tuple[str, str]:
        """The text before and after the subject; braces elsewhere are left alone."""
        marker = SLOT if SLOT in self.prompt else self.subject
        head, _, tail = self.prompt.partition(marker)
        return head, tail

    @property
    def span(self) -> tuple[int, int]:
        """Character interval of the subject inside :attr:`text`."""
        head = self.template[0]
        return len(head), len(head) + len(self.subject)

    def to_dict(self) -> dict[str, Any]:
        """Return the set fields as plain data."""
        record = {
            "prompt": self.prompt,
            "subject": self.subject,
            "target": self.target,
            "target_old": self.target_old,
            "id": self.id,
        }
        return {name: value for name, value in record.items() if value is not None}


def request_problems(prompt: str, subject: str, target: str) -> list[str]:
    """List what is wrong with a request's three texts, in words a user can act on."""
    problems = [
        f"{name} must be text, found {type(value).__name__} {value!r}"
        for name, value in (("prompt", prompt), ("subject", subject), ("target", target))
        if not isinstance(value, str)
    ]
    if problems:
        return problems
    problems = [
        f"{name} is empty"
        for name, value in (("prompt", prompt), ("subject", subject), ("target", target))
        if not value.strip()
    ]
    if not problems and subject != subject.strip():
        problems.append(f"subject {subject!r} begins or ends with white space")
    if problems:
        return problems
    slots = prompt.count(SLOT)
    if slots > 1:
        problems.append(f"prompt {prompt!r} has {slots} slots '{{}}', expected at most one")
    elif slots == 0:
        found = prompt.count(subject)
        if found == 0:
            problems.append(
                f"subject {subject!r} does not stand in prompt {prompt!r}; "
                "write it there as it is spelled, or mark its place with {}"
            )
        elif found > 1:
            problems.append(
                f"subject {subject!r} stands {found} times in prompt {prompt!r}; "
                "mark the one that is meant with {}"
            )
    return problems


@dataclass(frozen=True)
class Probe:
    """A question asked to measure an edit."""

    kind: str
    """What it measures: efficacy, paraphrase, neighbourhood, same_subject ..."""
    prompt: str
    """Text the model continues."""
    answers: tuple[str, ...]
    """Accepted answers once the edit is in place, the canonical one first."""
    before: tuple[str, ...]
    """Accepted answers of the unedited model, the canonical one first; may be unknown (empty)."""
    rival: str | None = None
    """The answer that must be less probable than ``answers[0]``; None: no such comparison."""

    @property
    def changes(self) -> bool:
        """Whether the edit is meant to change the answer."""
        return self.answers != self.before


@dataclass(frozen=True)
class Case:
    """One request with the probes that follow from it."""

    id: str
    request: Request
    probes: tuple[Probe, ...]


@dataclass(frozen=True)
class Observation:
    """What a host answered to one probe: texts and log-probabilities, no judgement."""

    text: str
    """Greedy continuation, up to the natural stop."""
    answer_logprobs: tuple[float, ...]
    """Log-probability of each token of the canonical answer, teacher-forced, in nats."""
    answer_top: tuple[bool, ...]
    """Whether each of those tokens was the most probable one."""
    rival_logprobs: tuple[float, ...]
    """The same for the rival; empty if there is none."""
    next_logprobs: Any = field(default=None, repr=False, compare=False)
    """Log-probabilities of the next token over the vocabulary, float32 ``[vocab]``; None if not asked."""


@dataclass(frozen=True)
class Row:
    """One line of a result table: one probe, one protocol, before and after."""

    case: str
    kind: str
    protocol: str
    prompt: str
    before: float
    after: float
    detail: Mapping[str, Any] = field(default_factory=dict)
