"""CKnowEdit: Chinese language, facts and logic that models get wrong: poems, idioms, pronunciations, trick questions.

A record has ``prompt``, ``target_new`` and ``target_old``, ``rephrase`` (other wordings), ``portability`` and
``locality`` (each a list of ``prompt`` and ``answer``; either may be absent or empty).

No subject is annotated, and none can be inferred: many prompts are instructions, such as to complete a line. The whole
prompt is the subject, so methods that edit at the subject's last token edit at the end of the prompt. An answer of
more than 40 characters or of several lines has form ``long``; shorter ones are matched exactly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record
from errata.data.sets._parts import has, name_of, question_request, refuse_unchanged, rival_to
from errata.types import Case, Form, Probe

TEXT = 40
"""Characters of the longest answer that is matched and not compared as a text."""


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip or Malformed."""
    name = f"cknowedit:{name_of(record)}"
    target, old = record.text("target_new").strip(), record.texts("target_old")
    refuse_unchanged(target, old)
    before = old[0].strip() if old else None
    request = question_request(record.text("prompt").strip(), target, before, name)
    old_answers, form = ((before,) if before else ()), _form(target)
    rival = rival_to((target,), before)
    probes = [Probe("efficacy", request.text, (target,), old_answers, rival, form=form)]
    probes += [
        Probe("paraphrase", text.strip(), (target,), old_answers, rival, form=form)
        for text in record.texts("rephrase")
    ]
    for item in record.records("portability"):
        answer = item.text("answer").strip()
        probes.append(Probe("portability", item.text("prompt").strip(), (answer,), (), form=_form(answer)))
    for item in record.records("locality"):
        answer = item.text("answer").strip()
        probes.append(
            Probe("locality", item.text("prompt").strip(), (answer,), (answer,), form=_form(answer))
        )
    yield Case(name, request, tuple(probes))


def _form(answer: str) -> Form:
    return "long" if len(answer) > TEXT or "\n" in answer else "short"


def fits(value: Any) -> bool:
    """Whether a record has both answers, other wordings and questions on what follows, and no subject."""
    return has(value, "prompt", "target_new", "target_old", "rephrase") and "subject" not in value


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count requests whose target is a text, and such as are matched."""
    forms = Counter(case.probes[0].form for case in cases)
    return {"targets that are matched": forms["short"], "targets compared as texts": forms["long"]}


DATASET = Dataset(
    name="cknowedit",
    title="CKnowEdit",
    paper="CKnowEdit: A New Chinese Knowledge Editing Dataset for Linguistics, Facts, and Logic Error Correction in "
    "LLMs, ACL 2025, arXiv 2409.05806",
    licence="MIT (repository)",
    home="Hugging Face dataset zjunlp/CKnowEdit; a copy in GitHub leonz-z/EasyEdit, dataset/ccks2024_know_edit",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "ccks-CKnowEdit.json"},
)
