"""Requests, probes, cases, observations and rows of text: frozen records, the standard library only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from errata.errors import RequestError, shown
from errata.types.picture import IMAGE, Picture, placed_in, plain_pictures, without_mark

SLOT = "{}"


@dataclass(frozen=True)
class Request:
    """What to change: complete ``prompt`` about ``subject`` with ``target`` from now on.

    Raises :class:`RequestError` when a field is empty, when the subject does not occur in the
    prompt, or when it occurs more than once and no ``{}`` says which one is meant.
    """

    prompt: str
    """A sentence up to the answer; ``{}`` marks the subject, or it contains the subject itself."""
    subject: str
    """The entity the fact is about, spelled as in the prompt; kept in the prompt's own Unicode form."""
    target: str
    """The answer the model is to give; space and invisible marks around it are dropped."""
    target_old: str | None = None
    """The answer it gives now, where known."""
    id: str | None = None
    """A name for messages and tables."""
    language: str | None = None
    """What language the prompt is in, by any name, where requests and probes are in several."""
    valid_from: str | None = None
    """Since when the target is the answer, an ISO date or a part of one (``2019``, ``2019-05``), where known: what held
    before is then still true of the time before."""
    indirect: tuple[str, ...] = ()
    """Prompts with the same target that do not name the subject but imply it ("The spouse of Ivo was born in", of
    whoever is married to Ivo), for methods that edit or train what is asked in several steps."""
    image: Picture | None = None
    """A picture that the prompt is about, for a model that reads pictures. It stands where the prompt says ``<image>``,
    else before it; a subject that is in the picture alone is called ``<image>``. Both are then written as the
    picture's mark, by which a host knows it."""
    more_images: tuple[Picture, ...] = ()
    """Further pictures, after ``image`` in the order of their ``<image>``. The subject ``<image>`` is then the picture
    in the place of ``{}``, or the first."""

    def __post_init__(self) -> None:
        texts: tuple[Any, ...] = (self.prompt, self.subject)
        object.__setattr__(self, "more_images", tuple(self.more_images))
        if self.image is None and self.more_images:
            raise RequestError("more_images: the first picture is image, which is missing")
        if self.image is not None and all(isinstance(text, str) for text in texts):
            self._place_pictures()
        problems = request_problems(self.prompt, self.subject, self.target)
        if problems:
            name = f"request {shown(self.id)}: " if self.id else ""
            raise RequestError(name + "; ".join(problems))
        if self.valid_from is not None and not is_date(self.valid_from):
            raise RequestError(
                f"valid_from: expected a date as 2019, 2019-05 or 2019-05-31, found {self.valid_from!r:.40}"
            )
        prompts: Any = self.indirect
        if isinstance(prompts, str) or not all(isinstance(p, str) and _trimmed(p) for p in prompts):
            raise RequestError(
                f"indirect: expected prompts, texts that are not empty, found {self.indirect!r:.80}"
            )
        object.__setattr__(self, "indirect", tuple(self.indirect))
        object.__setattr__(self, "target", _trimmed(self.target))
        if isinstance(self.target_old, str) and _trimmed(self.target_old):
            object.__setattr__(self, "target_old", _trimmed(self.target_old))
        if SLOT not in self.prompt:
            (subject,) = subject_forms(self.prompt, self.subject)
            object.__setattr__(self, "subject", subject)

    def _place_pictures(self) -> None:
        """Write the marks of the pictures into prompt and subject."""
        prompt, subject, pictures = self.prompt, self.subject, self.pictures
        if SLOT in prompt and subject == IMAGE:  # the slot is the place of one of them
            number = min(prompt.partition(SLOT)[0].count(IMAGE), len(pictures) - 1)
            own, others = pictures[number], (*pictures[:number], *pictures[number + 1 :])
            prompt = placed_in(prompt, others[0], others[1:]) if others else prompt
        else:
            own, filled = pictures[0], prompt.replace(SLOT, subject)
            if any(one.mark not in filled for one in pictures) or IMAGE in prompt:
                prompt = placed_in(prompt, pictures[0], pictures[1:])
        object.__setattr__(self, "prompt", prompt)
        object.__setattr__(self, "subject", subject.replace(IMAGE, own.mark))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures that the prompt is about, in order."""
        return () if self.image is None else (self.image, *self.more_images)

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
            "prompt": without_mark(self.prompt, self.image, self.more_images),
            "subject": without_mark(self.subject, self.image, self.more_images),
            "target": self.target,
            "target_old": self.target_old,
            "id": self.id,
            "language": self.language,
            "valid_from": self.valid_from,
            "indirect": list(self.indirect) or None,
            "image": plain_pictures(self.image, self.more_images),
        }
        return {name: value for name, value in record.items() if value is not None}


_DATE = re.compile(r"(\d{4})(?:-(0[1-9]|1[0-2])(?:-(0[1-9]|[12]\d|3[01]))?)?")


def is_date(text: Any) -> bool:
    """Whether a text is a year, a year and month, or a day, as ISO 8601 writes them."""
    return isinstance(text, str) and _DATE.fullmatch(text) is not None


def request_problems(prompt: str, subject: str, target: str) -> list[str]:
    """List what is wrong with a request's three texts, in words a user can act on."""
    values: list[tuple[str, Any]] = [("prompt", prompt), ("subject", subject), ("target", target)]
    problems = [
        f"{name} must be text, found {type(value).__name__} {shown(value)}"
        for name, value in values
        if not isinstance(value, str)
    ]
    if problems:
        return problems
    problems = [
        f"{name} is empty"
        for name, value in (("prompt", prompt), ("subject", subject), ("target", target))
        if not _trimmed(value)
    ]
    if not problems and subject != subject.strip():
        problems.append(f"subject {shown(subject)} begins or ends with white space")
    if problems:
        return problems
    slots = prompt.count(SLOT)
    if slots > 1:
        problems.append(f"prompt {shown(prompt)} has {slots} slots '{{}}', expected at most one")
    elif slots == 0:
        count = len(subject_forms(prompt, subject))
        if count == 0:
            problems.append(
                f"subject {shown(subject)} does not occur in prompt {shown(prompt)}; "
                "write it there as it is spelled, or mark its place with {}"
            )
        elif count > 1:
            problems.append(
                f"subject {shown(subject)} occurs {count} times in prompt {shown(prompt)}; "
                "mark the one that is meant with {}"
            )
    return problems


def subject_forms(prompt: str, subject: str) -> list[str]:
    """List the subject's occurrences in a prompt, each as it is written there.

    Texts are compared in Unicode's composed form (NFC), so that an accent may be a letter's own or a combining
    mark; a place that a combining accent follows is another word.
    """
    parts = prompt.split(subject)
    exact = [subject for rest in parts[1:] if not _accented(rest)]
    if exact or prompt.isascii():
        return exact
    composed = unicodedata.normalize("NFC", subject)
    if composed not in unicodedata.normalize("NFC", prompt):
        return []
    forms: list[str] = []
    at = 0
    while at < len(prompt):
        ends = range(at + 1, min(len(prompt), at + 4 * len(subject) + 4) + 1)
        same = [end for end in ends if unicodedata.normalize("NFC", prompt[at:end]) == composed]
        if same and not _accented(prompt[same[-1] :]):
            forms.append(prompt[at : same[-1]])
            at = same[-1]
        else:
            at += 1
    return forms


def _accented(rest: str) -> bool:
    """Whether a text begins with an accent that belongs to the letter before it."""
    return rest != "" and unicodedata.combining(rest[0]) >= 200


def _trimmed(text: str) -> str:
    """Take white space and invisible marks (direction marks, zero-width space) off both ends."""
    from errata.writing import strip  # loads regex

    return strip(text)


Form = Literal["short", "long", "thought", "choice", "span", "open", "steps"]
"""Forms of an answer: ``short``, a name or number; ``long``, a text compared with ``answers[0]``; ``thought``,
reasoning that ends in a short answer; ``choice``, the most probable of ``choices``; ``span``, scored by the
perplexity of ``answers[0]`` alone; ``open``, running text of which nothing is expected (``answers`` may be
passages to compare with); ``steps``, an answer reached step by step, each begun for the model by ``steps``."""


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
    form: Form = "short"
    """What kind of answer is expected, see :data:`Form`."""
    group: str | None = None
    """Name, inside the case, of what several probes ask together: the phrasings of one question, the hops of
    one chain, the queries of one test with their conditions. None: the probe is evaluated by itself."""
    need: Literal["any", "all"] = "any"
    """How many probes of the group must be answered right for the group to count."""
    choices: tuple[str, ...] = ()
    """Of form ``choice``: the labels to choose from, ``answers[0]`` among them."""
    covariates: tuple[tuple[str, float], ...] = ()
    """Numbers about the probe's subject, by name, for regressions over probes: the gender scores of a profession."""
    language: str | None = None
    """What language the prompt is in, by the names that requests have; None: that of the request, or unknown."""
    steps: tuple[str, ...] = ()
    """Of form ``steps``: the beginnings of the sentences that follow the prompt's, ``{}`` for the answer so far; the
    last one's answer is the probe's."""
    image: Picture | None = None
    """A picture that the prompt is about, at its place as in :class:`Request`."""
    more_images: tuple[Picture, ...] = ()
    """Further pictures, after ``image`` in the order of their ``<image>``."""

    def __post_init__(self) -> None:
        if self.image is not None:
            object.__setattr__(self, "prompt", placed_in(self.prompt, self.image, self.more_images))

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """All pictures that the prompt is about, in order."""
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def changes(self) -> bool:
        """Whether the edit is meant to change the answer."""
        return self.answers != self.before


@dataclass(frozen=True)
class Case:
    """One request with the probes that follow from it; a few datasets need several requests for one case."""

    id: str
    request: Request
    probes: tuple[Probe, ...]
    also: tuple[Request, ...] = ()
    """Further requests that must be in place together with the first: the other edits of a multi-hop chain."""

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests of the case, the first one first."""
        return (self.request, *self.also)


def plain_probe(probe: Probe) -> dict[str, Any]:
    """Return a probe as plain data, as its identity is hashed; later fields only where they are set."""
    return _without_unset(asdict(probe))


def plain_case(case: Case) -> dict[str, Any]:
    """Return a case as plain data, as its identity is hashed."""
    record = asdict(case)
    record["request"] = _without_unset(record["request"])
    record["also"] = tuple(_without_unset(request) for request in record["also"])
    return {**record, "probes": [plain_probe(probe) for probe in case.probes]}


_LATER = ("covariates", "language", "valid_from", "indirect", "steps", "image", "more_images")
"""Fields of probes and requests that came after cases had identities."""


def _without_unset(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out later fields that are not set, so that older identities stay what they were; of a picture its hash."""
    if record["image"] is not None:
        record["image"] = record["image"]["sha256"]
        record["more_images"] = tuple(one["sha256"] for one in record["more_images"])
    return {name: value for name, value in record.items() if name not in _LATER or value not in (None, ())}


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
    """Log-probabilities of the next token over the vocabulary, float32 ``[vocab]``; None if not requested."""
    choice_logprobs: tuple[tuple[float, ...], ...] = ()
    """Per choice, the log-probability of each of its tokens; empty if the probe has no choices."""
    routes: tuple[tuple[int, ...], ...] = ()
    """Of a model that stacks experts, where the next-token distribution is requested: per layer with experts and token
    of the prompt, the set of experts as a number whose bits are theirs."""
    trace: str = ""
    """What the host wrote before its answer: a thinking block, or the steps of form ``steps``; empty where nothing."""


@dataclass(frozen=True)
class Row:
    """One line of a result table: one probe, one protocol, before and after."""

    case: str
    kind: str
    protocol: str
    prompt: str
    before: float
    after: float
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])
