"""LeapOfThought, as SLAG edits it: a statement follows from a property of a class and from the thing being of that
class.

A record has ``phrase`` (the statement that follows), ``answer`` (1: it is true, 0: not) and ``metadata`` with
``rules``: true sentences, one of which states the ``property`` and, in half of the records, one the ``implicit_rule``
("A raven is a bird."); the others are distractors.

The request judges the sentence of the property: ``A bird is not a organism. True or false?`` is to be answered
``True``. The statement that follows is asked as kind ``logical``. The other sentences are true before and after:
``premise``, the implicit rule, and ``distractor``. Not used: ``context`` (the sentences in one text),
``statement`` and ``distractors`` (the sentences as triples) and ``split``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._parts import choice, has, name_of
from errata.types import Case, Probe

JUDGEMENTS = ("True", "False")
QUESTION = "{} True or false?"
NEVER = "never true"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip or Malformed."""
    answer = record.get("answer")
    if answer not in (0, 1):
        raise Malformed(f"answer: expected 0 or 1, found {answer!r:.60}")
    sentences = record.texts("metadata.rules", required=True)
    name = f"leapofthought:{name_of(record)}"
    edited = _sentence(record, "property", sentences)
    if edited is None:
        raise Skip("none of its rules, or several, state the property that is to be edited")
    subject = record.text("metadata.property.subject")
    request = make_request(QUESTION.replace("{}", edited), subject, "True", "False", id=name)
    probes = [
        choice("efficacy", request.text, "True", JUDGEMENTS, old="False"),
        choice(
            "logical",
            QUESTION.replace("{}", record.text("phrase").strip()),
            JUDGEMENTS[1 - int(answer)],
            JUDGEMENTS,
        ),
    ]
    premise = _sentence(record, "implicit_rule", sentences) if record.get("metadata.implicit_rule") else None
    for sentence in dict.fromkeys(sentences):
        if sentence != edited:
            kind = "premise" if sentence == premise else "distractor"
            probes.append(_true(kind, sentence))
    yield Case(name, request, tuple(probes))


def _true(kind: str, sentence: str) -> Probe:
    return choice(kind, QUESTION.replace("{}", sentence.strip()), "True", JUDGEMENTS, before="True")


def _sentence(record: Record, fact: str, sentences: Sequence[str]) -> str | None:
    """Find the only sentence that states a fact; None if none does, or several do."""
    path = f"metadata.{fact}"
    names = (record.text(f"{path}.subject"), record.text(f"{path}.object"))
    matches = [text for text in sentences if all(name in text for name in names)]
    if len(matches) > 1:
        negative = record.get(f"{path}.validity") == NEVER
        head = names[0].lower()
        matches = [
            t
            for t in matches
            if (" not " in t) == negative and f" {head} " in f" {t.lower()} "[: len(head) + 6]
        ]
    return matches[0] if len(matches) == 1 else None


def fits(value: Any) -> bool:
    """Whether a record is a statement with its rules."""
    return has(value, "phrase", "answer", "metadata") and has(value["metadata"], "rules", "property")


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count statements by truth, and records whose implicit rule is stated."""
    truth = Counter(p.answers[0] for case in cases for p in case.probes if p.kind == "logical")
    premises = sum(any(probe.kind == "premise" for probe in case.probes) for case in cases)
    return {"statements by truth": dict(sorted(truth.items())), "implicit rule stated": premises}


DATASET = Dataset(
    name="leapofthought",
    title="LeapOfThought (SLAG)",
    paper="Leap-Of-Thought: Teaching Pre-Trained Models to Systematically Reason Over Implicit Knowledge, NeurIPS "
    "2020, arXiv 2006.06609; edited in: Do Language Models Have Beliefs?, 2021, arXiv 2111.13654",
    licence="MIT (repository)",
    home="GitHub peterbhase/SLAG-Belief-Updating, data/LeapOfThought",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "leap_of_thought_test.jsonl"},
)
