"""Shared by CounterFact and the datasets derived from it: reading a record's request and building its probes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from errata.data._base import Record, make_request
from errata.data.sets._parts import has, locality_probe, rival_to
from errata.types import Probe, Request
from errata.writing import statement

AUTHORS_FIELDS = tuple(
    f"requested_rewrite.{field}" for field in ("prompt", "subject", "target_new.str", "target_true.str")
)
"""Paths of prompt, subject, new and old target in the authors' form."""
FLAT_FIELDS = ("prompt", "subject", "target_new", "ground_truth")
"""The same in the flat form."""


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
    return _request(record, name, AUTHORS_FIELDS)


def flat_rewrite(record: Record, name: str) -> Request:
    """Read the edit of a record in the flat form. Raises Skip, Malformed."""
    return _request(record, name, FLAT_FIELDS)


def _request(record: Record, name: str, fields: Iterable[str]) -> Request:
    prompt, subject, target, target_old = map(record.text, fields)
    return make_request(prompt, subject, target, target_old, id=name)


def paraphrase_probes(request: Request, prompts: Iterable[str], kind: str = "paraphrase") -> Iterator[Probe]:
    """Yield probes that ask for the new target with other prompts; the old target is the rival."""
    old = request.target_old
    for prompt in prompts:
        yield Probe(kind, prompt, (request.target,), (old,) if old else (), rival_to((request.target,), old))


def neighbourhood_probes(
    request: Request, prompts: Iterable[str], kind: str = "neighbourhood", answer: str | None = None
) -> Iterator[Probe]:
    """Yield probes on subjects that share the old object and must keep it; the new target is the rival."""
    right = answer or request.target_old
    for prompt in prompts:
        yield locality_probe(kind, prompt, (right,) if right else (), request.target)


def distracting_probes(
    request: Request, prompts: Iterable[str], answer: str | None = None
) -> Iterator[Probe]:
    """Yield neighbourhood probes with the edit prepended: ``<edit prompt> <new target>. <prompt>``."""
    prompts_after_edit = (f"{statement(request.text, request.target)} {prompt}" for prompt in prompts)
    return neighbourhood_probes(request, prompts_after_edit, "distracting", answer)
