"""zsRE in the forms made from KILT: MEND's JSON lines, and a plain list of questions with answers.

MEND's records have ``input`` (the question), ``output`` (gold answers), ``alternatives`` (wrong answers of another
model) and ``filtered_rephrases``; the list has ``question``, ``answer``, ``aliases``, ``question_id`` and ``type``. The
conventions are those of :mod:`errata.data.sets.zsre`; ``alt`` takes the first alternative that is no gold answer. The
list has no wrong answers, so under ``alt`` all of it is left out.

Neither form always names the subject. KILT's ``meta.sub_surface`` is used where the question contains it; else the
whole question is used as the subject, which the check counts: a guess, such as the longest capitalised name, could be
wrong unnoticed. Not used: ``prediction`` (another model's answer); ``type``, which ``question_id`` begins with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._parts import efficacy, has, is_answer, name_of, question_request, spellings
from errata.data.sets.zsre import ALT, TRUE, rephrasing_probes
from errata.types import Case, Request


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case under a convention. Raises Skip, Malformed."""
    if has(record.value, "question"):
        name = f"zsre_kilt:{name_of(record, 'question_id')}"
        question = record.text("question")
        gold = spellings(record.text("answer"), record.texts("aliases"))
    else:
        name = f"zsre_kilt:{name_of(record)}"
        question, gold = record.text("input"), _gold(record)
    if variant == TRUE:
        right, before = gold, ()
    else:
        right, before = (_wrong(record, gold),), gold
    request = _request(record, question, right[0], before[0] if before else None, name)
    probes = (
        efficacy(request, right, before),
        *rephrasing_probes(request, record.texts("filtered_rephrases"), right, before),
    )
    yield Case(name, request, probes)


def _gold(record: Record) -> tuple[str, ...]:
    """Read the gold answers, given as texts or as KILT's records with ``answer``."""
    items = record.get("output")
    if not isinstance(items, list):
        raise Malformed(f"output: expected a list of answers, found {type(items).__name__}")
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in items]
    answers = spellings("", (text for text in texts if isinstance(text, str)))
    if not answers:
        raise Malformed("output: expected at least one answer, found none")
    return answers


def _wrong(record: Record, gold: tuple[str, ...]) -> str:
    """Take the first alternative that is not right. Raises Skip where there is none."""
    alternatives = spellings("", record.texts("alternatives"))
    wrong = [text for text in alternatives if not is_answer(text, gold)]
    if not wrong:
        why = (
            f"its {len(alternatives)} alternatives are gold answers"
            if alternatives
            else "it has no alternatives"
        )
        raise Skip(f"no wrong answer to use as the target: {why}")
    return wrong[0]


def _request(record: Record, question: str, target: str, old: str | None, name: str) -> Request:
    for subject in record.texts("meta.sub_surface"):
        if subject.strip() in question:
            return make_request(question, subject, target, old, id=name)
    return question_request(question.strip(), target, old, name)


def fits(value: Any) -> bool:
    """Whether a record is of one of the two forms."""
    return has(value, "input", "output", "filtered_rephrases") or has(
        value, "question", "answer", "aliases", "question_id", "type"
    )


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count questions by the type at the head of their id, in the list form."""
    ids = [case.id.partition(":")[2].split("#")[0].split("-") for case in cases]
    types = Counter(parts[0] for parts in ids if len(parts) > 1)
    return {f"type {kind}": number for kind, number in sorted(types.items())}


DATASET = Dataset(
    name="zsre_kilt",
    title="zsRE, KILT forms",
    paper="Levy et al., CoNLL 2017, arXiv 1706.04115; KILT, NAACL 2021, arXiv 2009.02252; annotated by De Cao et al., "
    "EMNLP 2021, arXiv 2104.08164",
    licence="KILT: MIT; the annotations: not stated",
    home="MEND's data archive, zsre/structured_zeroshot-dev-new_annotated_final.jsonl (its README links it); the list "
    "is in the GitHub repository wookjeHan/Plug-and-Play-Adaptation-for-Continuously-updated-QA",
    fits=fits,
    cases=cases,
    variants=(TRUE, ALT),
    facts=facts,
    files={"": "zsre_dev_kilt.json"},
)
