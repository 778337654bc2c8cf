"""Pieces that several datasets build their cases from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from errata.data._base import Record, request
from errata.types import Case, Probe, Request

CARRIED = ("portability", "inverse question", "alternative_subject", "alter_subject_question")
"""Fields of EasyEdit's questions on what follows from an edit, put to rows of other sets."""


def has(value: Any, *fields: str) -> bool:
    """Whether a parsed record is a mapping with all of these fields."""
    return isinstance(value, Mapping) and all(name in value for name in fields)


def name_of(record: Record, field: str = "id") -> str:
    """Return the record's own id, or its number counted from 0 where it has none."""
    own = record.get(field)
    return str(record.index if own is None else own)


def spellings(first: str, more: Iterable[str] = ()) -> tuple[str, ...]:
    """Return accepted answers, the canonical one first, each once, without empty ones or outer space."""
    return tuple(dict.fromkeys(text.strip() for text in (first, *more) if text.strip()))


def whole(question: str, answer: str, old: str | None = None, id: str | None = None) -> Request:
    """Build a request from a question whose subject is not given: the whole question stands for it.

    Methods that edit at the subject's last token then edit at the end of the question, as the unstructured
    editors do. Raises Skip where question or answer is empty.
    """
    return request("{}", question, answer, old, id)


def efficacy(wanted: Request, right: Iterable[str] = (), before: Iterable[str] = ()) -> Probe:
    """Ask the request itself; ``right`` and ``before`` are further spellings of its two targets."""
    old = wanted.target_old
    known = spellings(old, before) if old else ()
    rival = old if old != wanted.target else None
    return Probe("efficacy", wanted.text, spellings(wanted.target, right), known, rival)


def kept(kind: str, prompt: str, right: tuple[str, ...], rival: str | None = None) -> Probe:
    """Ask for what an edit must leave as it was; a rival that is itself right is no rival."""
    return Probe(kind, prompt, right, right, None if rival in right else rival)


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
