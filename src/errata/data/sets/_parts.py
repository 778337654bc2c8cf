"""Pieces that several datasets build their cases from."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from errata.data._base import Malformed, Record, Skip, request
from errata.types import Case, Probe, Request

CARRIED = ("portability", "inverse question", "alternative_subject", "alter_subject_question")
"""Fields of EasyEdit's questions on what follows from an edit, put to rows of other sets."""
FLAT, ZSRE = ("prompt", "subject", "target_new"), ("src", "subject", "alt")
"""Fields of prompt, subject and target in EasyEdit's flat form and in zsRE's."""
LOCAL = ("distracting_neighborhood_prompts", "unrelated_relation")
"""Fields of EasyEdit's questions on what must not follow, put to rows that may hold the former too."""


def has(value: Any, *fields: str) -> bool:
    """Whether a parsed record is a mapping with all of these fields."""
    return isinstance(value, Mapping) and all(name in value for name in fields)


def plain_texts(value: Any) -> bool:
    """Whether a field is a text or a list of texts."""
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def name_of(record: Record, field: str = "id") -> str:
    """Return the record's own id, or its number counted from 0 where it has none."""
    own = record.get(field)
    return str(record.index if own is None else own)


def spellings(first: str, more: Iterable[str] = ()) -> tuple[str, ...]:
    """Return accepted answers, the canonical one first, each once, without empty ones or outer space."""
    return tuple(dict.fromkeys(text.strip() for text in (first, *more) if text.strip()))


def read_request(
    record: Record, fields: tuple[str, str, str], old: Sequence[str] = (), id: str | None = None
) -> Request:
    """Build a request from a record's fields of prompt, subject and target, such as FLAT.

    ``old``: the answers before the edit, of which the first is the old target. Raises Skip or Malformed.
    """
    prompt, subject, target = (record.text(field) for field in fields)
    return request(prompt, subject, target, old[0] if old else None, id)


def whole(question: str, answer: str, old: str | None = None, id: str | None = None) -> Request:
    """Build a request from a question whose subject is not given: the whole question stands for it.

    Methods that edit at the subject's last token then edit at the end of the question, as the unstructured
    editors do. Raises Skip where question or answer is empty.
    """
    return request("{}", question, answer, old, id)


def plain(text: str) -> str:
    """Return a text as it is compared with another: composed, without case, with single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def among(text: str, answers: Iterable[str]) -> bool:
    """Whether a text is one of some answers, whatever its capitals and spaces."""
    return plain(text) in {plain(answer) for answer in answers}


def rival_to(answers: Sequence[str], old: str | None, before: Iterable[str] = ()) -> str | None:
    """Return the old answer as the rival of the new ones; None where it is accepted as well, as an alias.

    ``before``: spellings of the old answer, none of which may be the new one either: they then name the same.
    """
    if old is None or among(old, answers) or among(answers[0], before):
        return None
    return old


def efficacy(wanted: Request, right: Iterable[str] = (), before: Iterable[str] = ()) -> Probe:
    """Ask the request itself; ``right`` and ``before`` are further spellings of its two targets."""
    old = wanted.target_old
    known = spellings(old, before) if old else ()
    answers = spellings(wanted.target, right)
    return Probe("efficacy", wanted.text, answers, known, rival_to(answers, old, known))


def refuse_unchanged(target: str, old: Iterable[str]) -> None:
    """Raise Skip where an edit would change nothing: its target is an answer that is right before it."""
    if among(target, old):
        raise Skip(f"the edit changes nothing: the target {target.strip()!r} is among the answers before it")


def choice(
    kind: str, prompt: str, answer: str, choices: Sequence[str], before: str | None = None, old: str | None = None
) -> Probe:  # fmt: skip
    """Ask for one of some labels. Raises Malformed where the answer is none of them."""
    labels = tuple(dict.fromkeys(label.strip() for label in choices if label.strip()))
    if answer not in labels:
        raise Malformed(f"the answer {answer!r} is none of those to choose from: {', '.join(labels)}")
    known = () if before is None else (before,)
    rival = rival_to((answer,), old)
    return Probe(kind, prompt, (answer,), known, rival, form="choice", choices=labels)


def kept(kind: str, prompt: str, right: tuple[str, ...], rival: str | None = None) -> Probe:
    """Ask for what an edit must leave as it was; a rival that is itself right is no rival."""
    return Probe(kind, prompt, right, right, rival_to(right, rival))


def long_answer(kind: str, prompt: str, answer: str) -> Probe:
    """Ask for a running text that is compared with ``answer``; the unedited answer is not known."""
    return Probe(kind, prompt, (answer.strip(),), (), form="long")


def count(cases: Sequence[Case], kind: str) -> int:
    """Count the probes of a kind."""
    return sum(probe.kind == kind for case in cases for probe in case.probes)


def mean_words(cases: Sequence[Case]) -> float | None:
    """Mean length of the requests' targets in words, to one decimal; None without requests."""
    lengths = [len(wanted.target.split()) for case in cases for wanted in case.requests]
    return round(sum(lengths) / len(lengths), 1) if lengths else None


def cut(statement: str, id: str | None = None) -> Request:
    """Build a request from a statement that its dataset does not take apart: its second half completes the first.

    The whole first half stands for the subject. Halves are of words; of characters where there are no spaces.
    Raises Skip for a statement of one word or character.
    """
    words = statement.split()
    pieces, join = (words, " ") if len(words) > 1 else (list(statement.strip()), "")
    middle = len(pieces) // 2
    if not middle:
        raise Skip(f"the statement {statement!r:.60} is too short to be completed")
    return whole(join.join(pieces[:middle]), join.join(pieces[middle:]), id=id)
