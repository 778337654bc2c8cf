"""zsRE in the forms made from KILT: MEND's JSON lines, and a plain list of questions with answers.

MEND's records have ``input`` (the question), ``output`` (gold answers), ``alternatives`` (wrong answers of another
model) and ``filtered_rephrases``; the list has ``question``, ``answer``, ``aliases``, ``question_id`` and ``type``. The
conventions are those of :mod:`errata.data.sets.zsre`; ``alt`` takes the first alternative that is no gold answer. The
list has no wrong answers, so under ``alt`` all of it is left out.

Neither form has to name the subject. Where KILT's ``meta.sub_surface`` does and it stands in the question, it is
taken; else the whole question stands for it, which the check counts: a guess, such as the longest name in
capitals, would be wrong in ways nobody sees. ``prediction`` (another model's answer) is left aside; ``type`` is
repeated at the head of ``question_id``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, request
from errata.data.sets._parts import among, efficacy, has, name_of, spellings, whole
from errata.data.sets.zsre import ALT, TRUE, rephrased
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
    wanted = _request(record, question, right[0], before[0] if before else None, name)
    probes = (
        efficacy(wanted, right, before),
        *rephrased(wanted, record.texts("filtered_rephrases"), right, before),
    )
    yield Case(name, wanted, probes)


def _gold(record: Record) -> tuple[str, ...]:
    """Read the gold answers, given as texts or as KILT's records with ``answer``."""
    listed = record.get("output")
    if not isinstance(listed, list):
        raise Malformed(f"output: expected a list of answers, found {type(listed).__name__}")
    texts = [item.get("answer") if isinstance(item, Mapping) else item for item in listed]
    found = spellings("", (text for text in texts if isinstance(text, str)))
    if not found:
        raise Malformed("output: expected at least one answer, found none")
    return found


def _wrong(record: Record, gold: tuple[str, ...]) -> str:
    """Take the first alternative that is not right. Raises Skip where there is none."""
    offered = spellings("", record.texts("alternatives"))
    wrong = [text for text in offered if not among(text, gold)]
    if not wrong:
        why = f"its {len(offered)} alternatives are gold answers" if offered else "it has no alternatives"
        raise Skip(f"no wrong answer to teach: {why}")
    return wrong[0]


def _request(record: Record, question: str, target: str, old: str | None, name: str) -> Request:
    for subject in record.texts("meta.sub_surface"):
        if subject.strip() in question:
            return request(question, subject, target, old, id=name)
    return whole(question.strip(), target, old, name)


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
