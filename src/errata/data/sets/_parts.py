"""Helpers shared by the dataset modules: building requests and probes from a record's fields."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from errata.data._base import Malformed, Record, Skip, make_request
from errata.types import Case, Probe, Request

PORTABILITY_FIELDS = ("portability", "inverse question", "alternative_subject", "alter_subject_question")
"""Fields with EasyEdit's portability questions, which EasyEdit adds to rows of other datasets."""
FLAT, ZSRE = ("prompt", "subject", "target_new"), ("src", "subject", "alt")
"""Fields of prompt, subject and target in EasyEdit's flat form and in zsRE's."""
LOCALITY_FIELDS = ("distracting_neighborhood_prompts", "unrelated_relation")
"""Fields with EasyEdit's locality questions; rows that have them may have portability questions too."""


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
    """Return the accepted answers, canonical one first: stripped, without duplicates or empty strings."""
    return tuple(dict.fromkeys(text.strip() for text in (first, *more) if text.strip()))


def read_request(
    record: Record, fields: tuple[str, str, str], old: Sequence[str] = (), id: str | None = None
) -> Request:
    """Build a request from a record's fields of prompt, subject and target, such as FLAT.

    ``old``: the answers before the edit, of which the first is the old target. Raises Skip or Malformed.
    """
    prompt, subject, target = (record.text(field) for field in fields)
    return make_request(prompt, subject, target, old[0] if old else None, id)


def question_request(question: str, answer: str, old: str | None = None, id: str | None = None) -> Request:
    """Build a request from a question without an annotated subject: the whole question is the subject.

    Methods that edit at the subject's last token then edit at the last token of the question, as methods for
    unstructured text do. Raises Skip where question or answer is empty.
    """
    return make_request("{}", question, answer, old, id)


def plain(text: str) -> str:
    """Normalise a text for comparison: Unicode NFC, case folded, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def is_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether a text equals one of the answers, ignoring case and white space."""
    return plain(text) in {plain(answer) for answer in answers}


def rival_to(answers: Sequence[str], old: str | None, before: Iterable[str] = ()) -> str | None:
    """Return the old answer as the rival; None where it is also accepted as a new answer (an alias).

    ``before``: spellings of the old answer. There is no rival if one of them is the new answer: both then name
    the same thing.
    """
    if old is None or is_answer(old, answers) or is_answer(answers[0], before):
        return None
    return old


def efficacy(request: Request, right: Iterable[str] = (), before: Iterable[str] = ()) -> Probe:
    """Build the efficacy probe; ``right`` and ``before``: further spellings of the new and the old target."""
    old = request.target_old
    old_answers = spellings(old, before) if old else ()
    answers = spellings(request.target, right)
    return Probe("efficacy", request.text, answers, old_answers, rival_to(answers, old, old_answers))


def refuse_unchanged(target: str, old: Iterable[str]) -> None:
    """Raise Skip where an edit would change nothing: its target is already an answer before the edit."""
    if is_answer(target, old):
        raise Skip(f"the edit changes nothing: the target {target.strip()!r} is among the answers before it")


def choice(
    kind: str, prompt: str, answer: str, choices: Sequence[str], before: str | None = None, old: str | None = None
) -> Probe:  # fmt: skip
    """Build a multiple-choice probe over labels. Raises Malformed where the answer is not among them."""
    labels = tuple(dict.fromkeys(label.strip() for label in choices if label.strip()))
    if answer not in labels:
        raise Malformed(f"the answer {answer!r} is none of those to choose from: {', '.join(labels)}")
    old_answers = () if before is None else (before,)
    rival = rival_to((answer,), old)
    return Probe(kind, prompt, (answer,), old_answers, rival, form="choice", choices=labels)


def locality_probe(kind: str, prompt: str, right: tuple[str, ...], rival: str | None = None) -> Probe:
    """Build a probe whose answer must not change; a rival that is itself a right answer is dropped."""
    return Probe(kind, prompt, right, right, rival_to(right, rival))


def long_answer(kind: str, prompt: str, answer: str) -> Probe:
    """Build a probe for a long answer, compared with ``answer``; the answer before the edit is unknown."""
    return Probe(kind, prompt, (answer.strip(),), (), form="long")


def count(cases: Sequence[Case], kind: str) -> int:
    """Count the probes of a kind."""
    return sum(probe.kind == kind for case in cases for probe in case.probes)


def mean_words(cases: Sequence[Case]) -> float | None:
    """Return the mean number of words of the targets, to one decimal; None without requests."""
    lengths = [len(request.target.split()) for case in cases for request in case.requests]
    return round(sum(lengths) / len(lengths), 1) if lengths else None


def completion_request(statement: str, id: str | None = None) -> Request:
    """Build a request from a statement without annotation: its first half is to be completed by its second.

    The first half is also the subject. The statement is split by words, or by characters if it has no spaces.
    Raises Skip for a statement of one word or character.
    """
    words = statement.split()
    pieces, join = (words, " ") if len(words) > 1 else (list(statement.strip()), "")
    middle = len(pieces) // 2
    if not middle:
        raise Skip(f"the statement {statement!r:.60} is too short to be completed")
    return question_request(join.join(pieces[:middle]), join.join(pieces[middle:]), id=id)
