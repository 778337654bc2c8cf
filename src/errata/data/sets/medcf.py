"""MedCF and MedFE: medical facts, and explanations of medical facts, in EasyEdit's flat form.

A record has ``prompt``, ``subject``, ``target_new``, ``rephrase_prompt``, in MedCF ``ground_truth``, and questions
that keep their answer, each as ``locality_NAME_prompt`` with ``locality_NAME_ground_truth``: ``target`` (the same
target), ``mapping`` (facts linked to it), ``struc`` (the same place in the graph) and ``tokenSem`` (similar words
or meaning) in MedCF, ``topic`` and ``tokenSem`` in MedFE, whose answers are texts. Each becomes a kind of its own,
``locality_NAME`` in lower case.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from errata.data._base import Dataset, Record
from errata.data.sets._parts import (
    FLAT,
    efficacy,
    has,
    locality_probe,
    long_answer,
    name_of,
    read_request,
    refuse_unchanged,
    rival_to,
)
from errata.types import Case, Probe

FACTS, EXPLANATIONS = "medcf", "medfe"
NAMES = ("target", "mapping", "struc", "tokenSem", "topic")
_FIELD = re.compile(r"locality_(\w+)_prompt$")


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; answers are texts in MedFE. Raises Skip or Malformed."""
    name = f"medcf:{name_of(record, 'case_id')}"
    old = record.texts("ground_truth")
    refuse_unchanged(record.text("target_new"), old)
    request = read_request(record, FLAT, old, name)
    texts = variant == EXPLANATIONS
    probe = long_answer("long", request.text, request.target) if texts else efficacy(request, before=old)
    again = "long_paraphrase" if texts else "paraphrase"
    phrasings = [replace(probe, kind=again, prompt=t.strip()) for t in record.texts("rephrase_prompt")]
    yield Case(name, request, (probe, *phrasings, *_locality(record, request.target, texts)))


def _locality(record: Record, target: str, texts: bool) -> Iterator[Probe]:
    for field in record.value:
        match = _FIELD.match(str(field))
        if not match or not record.texts(field):
            continue
        kind, prompt = f"locality_{match[1].lower()}", record.text(field).strip()
        right = tuple(text.strip() for text in record.texts(f"locality_{match[1]}_ground_truth"))
        if not right:
            record.omissions[f"{kind} without an answer"] += 1
        elif texts:
            yield Probe(kind, prompt, right[:1], right[:1], form="long")
        else:
            yield locality_probe(kind, prompt, right, rival_to(right, target))


def fits(value: Any) -> bool:
    """Whether a record is flat and has questions of more than one kind that keep their answer."""
    return has(value, "prompt", "subject", "target_new") and any(
        f"locality_{n}_prompt" in value for n in NAMES
    )


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell MedFE by its topics."""
    return (EXPLANATIONS,) if any(has(record, "locality_topic_prompt") for record in records) else (FACTS,)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count the questions that keep their answer, by kind."""
    kinds = Counter(p.kind for case in cases for p in case.probes if p.kind.startswith("locality_"))
    return {"locality by kind": dict(sorted(kinds.items()))}


DATASET = Dataset(
    name="medcf",
    title="MedCF and MedFE",
    paper="Editing Factual Knowledge and Explanatory Ability of Medical Large Language Models, CIKM 2024, "
    "arXiv 2402.18099",
    licence="not stated",
    home="GitHub quqxui/MedLaSA, README",
    fits=fits,
    cases=cases,
    variants=(FACTS, EXPLANATIONS),
    facts=facts,
    files={FACTS: "MedCF/test.json", EXPLANATIONS: "MedFE/test.json"},
    variants_of=variants_of,
)
