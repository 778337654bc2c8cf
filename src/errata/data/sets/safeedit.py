"""SafeEdit: jailbreak attacks with harmful questions, which the edited model must refuse.

A record has ``question`` (the harmful request), ``adversarial prompt`` (the same under an attack), ``safe
generation`` and ``unsafe generation``, ``generalization test`` with four further prompts, and ``knowledge
constrain`` with a harmless question and its answer. The request is to answer the adversarial prompt safely; the
whole prompt is used as the subject.

Whether a reply is safe is for a classifier to say, so the four further prompts are of form ``open``:
``safety_question`` (without attack), ``safety_attack`` (another attack), ``safety_other`` (another question) and
``safety_other_attack`` (another of both). The harmless question keeps its answer. Not used: ``unsafety
category``.

The data are under a licence for non-commercial use, CC BY-NC-SA 4.0, behind a gate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record
from errata.data.sets._parts import has, name_of, question_request, refuse_unchanged
from errata.types import Case, Probe

TESTS = {
    "test input of only harmful question": "safety_question",
    "test input of other attack prompt": "safety_attack",
    "test input of other question": "safety_other",
    "test input of other questions and attack prompts": "safety_other_attack",
}
"""Prompts of ``generalization test`` and kinds of probes; the files add " input" to some of the names."""


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip or Malformed."""
    name = f"safeedit:{name_of(record)}"
    safe, unsafe = record.text("safe generation").strip(), record.text("unsafe generation").strip()
    refuse_unchanged(safe, (unsafe,))
    request = question_request(record.text("adversarial prompt").strip(), safe, unsafe, name)
    probes = [Probe("long", request.text, (safe,), (unsafe,), unsafe, form="long")]
    tests = Record(
        record.get("generalization test") or {}, f"{record.where}, generalization test", 0, record.omissions
    )
    for field, kind in TESTS.items():
        prompts = tests.texts(field) or tests.texts(f"{field} input")
        probes += [Probe(kind, text.strip(), (), (), form="open") for text in prompts]
    constraint = Record(
        record.get("knowledge constrain") or {}, f"{record.where}, knowledge constrain", 0, record.omissions
    )
    if constraint.texts("prompt"):
        answer = constraint.text("answer").strip()
        probes.append(Probe("locality", constraint.text("prompt").strip(), (answer,), (answer,), form="long"))
    yield Case(name, request, tuple(probes))


def fits(value: Any) -> bool:
    """Whether a record has an attack and both replies."""
    return has(value, "adversarial prompt", "safe generation", "unsafe generation")


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count the further prompts by kind."""
    kinds = Counter(p.kind for case in cases for p in case.probes if p.kind in TESTS.values())
    return {"further prompts": dict(kinds)}


DATASET = Dataset(
    name="safeedit",
    title="SafeEdit",
    paper="Detoxifying Large Language Models via Knowledge Editing, ACL 2024, arXiv 2403.14472",
    licence="CC BY-NC-SA 4.0",
    home="Hugging Face dataset zjunlp/SafeEdit, behind a gate; its terms are to be accepted there",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "SafeEdit_test.json"},
)
