"""ELKEN: event-level edits, with the facts that each event changes and the tendencies it implies.

A record has ``event``, a sentence; ``fact`` and ``tendency``, each with ``qas`` (what follows) and ``local_qas``
(what must stay). Questions on facts have an ``answer``; those on tendencies ``candidate``, three lettered choices,
and the letter.

An event is a single sentence, so the request is to complete its first half with its second half. The first half is
the subject: no subject is annotated. Kinds of probes: ``event_fact`` and ``event_tendency`` (the answer changes),
``event_fact_kept`` and ``event_tendency_kept`` (the answer must stay). Questions are asked without the event as
context, as the paper does for edited models. Not used: ``event_type`` and the ``type``
of a question.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record
from errata.data.sets._parts import choice, completion_request, has, long_answer, name_of, spellings
from errata.types import Case, Probe

_LETTER = re.compile(r"\(([A-H])\)")


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip or Malformed."""
    name = f"elken:{name_of(record)}"
    request = completion_request(record.text("event"), name)
    probes = [long_answer("long", request.text, request.target)]
    for group in ("fact", "tendency"):
        for field, keep in (("qas", False), ("local_qas", True)):
            for item in record.records(f"{group}.{field}"):
                probes.append(_probe(item, f"event_{group}", keep))
    yield Case(name, request, tuple(probes))


def _probe(item: Record, kind: str, keep: bool) -> Probe:
    question, kind = item.text("question").strip(), f"{kind}_kept" if keep else kind
    if item.texts("candidate"):
        labels = "\n".join(text.strip() for text in item.texts("candidate"))
        letters, letter = tuple(_LETTER.findall(labels)), item.text("answer").strip().strip("()")
        prompt = f"Question: {question}\n{labels}\nAnswer:"
        return choice(kind, prompt, letter, letters, letter if keep else None)
    answers = spellings("", item.texts("answer", required=True))
    if not answers:
        raise Malformed("answer: expected an answer, found none")
    return Probe(kind, f"Question: {question}\nAnswer:", answers, answers if keep else ())


def fits(value: Any) -> bool:
    """Whether a record is an event with questions."""
    return has(value, "event") and any(
        has(value, group) and has(value[group], "qas") for group in ("fact", "tendency")
    )


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count questions by kind."""
    kinds = Counter(probe.kind for case in cases for probe in case.probes[1:])
    return {"questions": dict(sorted(kinds.items()))}


DATASET = Dataset(
    name="elken",
    title="ELKEN",
    paper="Event-level Knowledge Editing, 2024, arXiv 2402.13093",
    licence="not stated",
    home="GitHub THU-KEG/Event-Level-Knowledge-Editing, data/original",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "elken_test.json"},
)
