"""What CounterFact and the sets made after it share: the edit of a record, and probes of its prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from errata.data._base import Record, request
from errata.data.sets._parts import has, kept, rival_to
from errata.types import Probe, Request
from errata.writing import statement


def nested(value: Any) -> bool:
    """Whether a record holds one edit in the authors' form, ``requested_rewrite`` with two targets."""
    return has(value, "requested_rewrite") and has(
        value["requested_rewrite"], "prompt", "subject", "target_new", "target_true"
    )


def flat(value: Any) -> bool:
    """Whether a record holds one edit in EasyEdit's flat form, with a neighbour's prompt."""
    return has(value, "prompt", "subject", "target_new", "ground_truth", "locality_prompt")


def rewrite(record: Record, name: str) -> Request:
    """Read the edit of a record in the authors' form. Raises Skip, Malformed."""
    return request(
        record.text("requested_rewrite.prompt"),
        record.text("requested_rewrite.subject"),
        record.text("requested_rewrite.target_new.str"),
        record.text("requested_rewrite.target_true.str"),
        id=name,
    )


def flat_rewrite(record: Record, name: str) -> Request:
    """Read the edit of a record in the flat form. Raises Skip, Malformed."""
    return request(
        record.text("prompt"),
        record.text("subject"),
        record.text("target_new"),
        record.text("ground_truth"),
        id=name,
    )


def asked_again(wanted: Request, prompts: Iterable[str], kind: str = "paraphrase") -> Iterator[Probe]:
    """Ask for the new target by other prompts; the old one is the rival."""
    old = wanted.target_old
    for prompt in prompts:
        yield Probe(kind, prompt, (wanted.target,), (old,) if old else (), rival_to((wanted.target,), old))


def neighbours(
    wanted: Request, prompts: Iterable[str], kind: str = "neighbourhood", answer: str | None = None
) -> Iterator[Probe]:
    """Ask about subjects that share the old object, which they keep; the new target is the rival."""
    right = answer or wanted.target_old
    for prompt in prompts:
        yield kept(kind, prompt, (right,) if right else (), wanted.target)


def distracting(wanted: Request, prompts: Iterable[str], answer: str | None = None) -> Iterator[Probe]:
    """Ask the neighbours' prompts with the edit stated before them: ``<edit> <new target>. <prompt>``."""
    stated = (f"{statement(wanted.text, wanted.target)} {prompt}" for prompt in prompts)
    return neighbours(wanted, stated, "distracting", answer)
