"""1,209 facts that GPT-2 XL knows, collected for causal tracing.

A record has ``prompt``, ``subject`` and ``attribute``, the answer. The facts are true: a case's request states the
fact, and its one probe, with the same answer before and after, tests whether a model knows it. The cases are for
tracing and attribution, which read prompts and subjects; as edits they change nothing. Not used: ``template`` (the
prompt without its last words), ``prediction`` (GPT-2 XL's continuation),
``relation_id``, and the columns named by models that a copy adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record, make_request
from errata.data.sets._parts import has, locality_probe, name_of
from errata.types import Case


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip or Malformed."""
    name = f"known_1000:{name_of(record, 'known_id')}"
    request = make_request(record.text("prompt"), record.text("subject"), record.text("attribute"), id=name)
    yield Case(name, request, (locality_probe("efficacy", request.text, (request.target,)),))


def fits(value: Any) -> bool:
    """Whether a record is a known fact."""
    return has(value, "known_id", "subject", "attribute", "prompt")


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count subjects and attributes."""
    return {
        "subjects": len({case.request.subject for case in cases}),
        "attributes": len({case.request.target for case in cases}),
    }


DATASET = Dataset(
    name="known_1000",
    title="Known facts for causal tracing",
    paper="Meng et al., Locating and Editing Factual Associations in GPT, NeurIPS 2022, arXiv 2202.05262",
    licence="not stated for the data; the authors' code is MIT",
    home="https://rome.baulab.info/data/dsets/known_1000.json",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "known_1000.json"},
    urls={"": "https://rome.baulab.info/data/dsets/known_1000.json"},
)
