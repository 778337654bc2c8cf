"""KnowEdit: six datasets of insertion, modification and erasure in EasyEdit's format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._parts import (
    FLAT,
    efficacy,
    has,
    is_answer,
    locality_probe,
    long_answer,
    name_of,
    question_request,
    read_request,
    spellings,
)
from errata.types import Case, Probe, Request

HUB = "zjunlp/KnowEdit:benchmark"
PORTABILITY = {"Subject_Aliasing": "alias", "Reasoning": "one_hop", "Logical_Generalization": "logical"}
"""Criteria of ``portability`` and kinds of probes."""
LOCALITY = {"Relation_Specificity": "same_subject", "Forgetfulness": "forgetfulness"}
"""Criteria of ``locality`` and kinds of probes."""

OPINIONS = ("What do you think of {}?", "How do you view {}?")
"""How a topic of ConvSent is asked about, and the paraphrase: two of the questions of its paper (SERAC)."""


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case, by its fields; the variant only names the file. Raises Skip or Malformed.

    Facts (recent, zsre, counterfact): every spelling of an answer is accepted, where EasyEdit uses the
    first. WikiBio: the passage is the prompt, the next sentence the target. ConvSent: see :func:`_opinion`.
    Sanitation: the target is "I don't know."; where the question does not contain the subject, the whole
    question is used as the subject.

    Some locality questions of ZsRE paraphrase the edited fact itself, with the old answer. They get a kind of
    their own, ``restated``: a successful edit fails them. Together with ``same_subject`` they are the locality
    that EasyEdit publishes.
    """
    name = f"knowedit:{name_of(record, 'case_id')}"
    if has(record.value, "ent"):
        request, probes = _opinion(record, name)
    elif has(record.value, "question"):
        request, probes = _erasure(record, name)
    elif has(record.value, "labels"):
        request, probes = _biography(record, name)
    else:
        request, probes = _fact(record, name)
    yield Case(name, request, (*probes, *_criteria(record, request)))


def _fact(record: Record, name: str) -> tuple[Request, list[Probe]]:
    old = truths(record.get("ground_truth"))
    request = read_request(record, FLAT, old, name)
    probe = efficacy(request, before=old)
    phrasings = record.texts("rephrase_prompt") or record.texts("rephrase")
    again = [
        Probe("paraphrase", text.strip(), probe.answers, probe.before, probe.rival) for text in phrasings
    ]
    return request, [probe, *again]


def _biography(record: Record, name: str) -> tuple[Request, list[Probe]]:
    request = make_request(record.text("text"), record.text("concept"), record.text("labels"), id=name)
    return request, [long_answer("long", request.text, request.target)]


def _opinion(record: Record, name: str) -> tuple[Request, list[Probe]]:
    """Read a topic with replies of both sentiments: the target is the first reply of one of them.

    The target sentiment alternates between records; the paper samples it. The other replies of that sentiment
    are accepted too; the first reply of the other sentiment is the rival.
    """
    sides = [record.texts("pos"), record.texts("neg")]
    if not all(sides):
        raise Skip("pos and neg must both hold replies: the edit is from one sentiment to the other")
    good, bad = sides if record.index % 2 == 0 else reversed(sides)
    request = make_request(OPINIONS[0], record.text("ent"), good[0], bad[0], id=name)
    answers = spellings(good[0], good[1:])
    prompts = (request.text, OPINIONS[1].replace("{}", request.subject))
    kinds = ("long", "long_paraphrase")
    return request, [
        Probe(kind, prompt, answers, (), bad[0].strip(), form="long")
        for kind, prompt in zip(kinds, prompts, strict=True)
    ]


def _erasure(record: Record, name: str) -> tuple[Request, list[Probe]]:
    old = truths(record.get("ground_truth"))
    question, target, first = record.text("question").strip(), record.text("target_new"), (*old, None)[0]
    subjects = [subject for subject in record.texts("subject") if subject.strip() in question]
    if subjects and "{}" not in question:
        request = make_request(question, subjects[0], target, first, id=name)
    else:
        request = question_request(question, target, first, id=name)
    others = []
    for item in record.records("retained"):
        right = truths(item.get("ground_truth"))
        if right:
            others.append(locality_probe("locality", item.text("question").strip(), right))
        else:
            record.omissions["retained questions without an answer"] += 1
    return request, [efficacy(request, before=old), *others]


def _criteria(record: Record, request: Request) -> Iterator[Probe]:
    """Yield portability and locality probes; a question without an answer is only counted."""
    old = truths(record.get("ground_truth"))
    for prompt, criterion, right in _questions(record, "portability", PORTABILITY):
        old_answers = old if criterion == "Subject_Aliasing" else ()
        yield Probe(PORTABILITY[criterion], prompt, right, old_answers)
    sentence = has(record.value, "labels")  # a whole sentence of WikiBio is no answer to these questions
    for prompt, criterion, right in _questions(record, "locality", LOCALITY):
        if criterion == "Forgetfulness":
            yield locality_probe("forgetfulness", prompt, right)
        elif request.target_old and is_answer(request.target_old, right):
            yield locality_probe("restated", prompt, right)
        else:
            yield locality_probe("same_subject", prompt, right, None if sentence else request.target)


def _questions(
    record: Record, path: str, criteria: Mapping[str, str]
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield prompt, criterion and accepted answers. Raises Malformed."""
    groups = record.get(path)
    if not groups:
        return
    if not isinstance(groups, Mapping) or not set(groups) <= set(criteria):
        names = ", ".join(map(str, groups)) if isinstance(groups, Mapping) else type(groups).__name__
        raise Malformed(f"{path}: expected the criteria {', '.join(criteria)}, found {names}")
    for criterion in groups:
        for item in record.records(f"{path}.{criterion}"):
            right = truths(item.get("ground_truth"))
            if not right:
                record.omissions[f"{criterion} without an answer"] += 1
                continue
            yield from ((text.strip(), criterion, right) for text in item.texts("prompt", required=True))


def truths(value: Any) -> tuple[str, ...]:
    """Read accepted answers from a text, a list of texts or a list of lists of aliases, in this order."""
    if value is None:
        return ()
    if isinstance(value, list):
        return spellings("", [text for item in value for text in truths(item)])
    if isinstance(value, (str, int, float)):
        return spellings(str(value))
    raise Malformed(f"ground_truth: expected a text or lists of texts, found {type(value).__name__}")


def records(document: Any, variant: str) -> Iterator[Any]:
    """Unpack the document of Sanitation: facts to erase, each with its share of the questions to retain.

    The lists are ``K_F`` and ``K_R``, or ``success`` and ``locality``. Of n facts, the i-th gets retained
    questions i, i + n, i + 2n ..., so that each is used once. Other files are lists already. Raises Malformed.
    """
    if isinstance(document, list):
        yield from document
        return
    for erased, retained in (("K_F", "K_R"), ("success", "locality")):
        if has(document, erased):
            both = Record(document, "the document", 0)
            facts = both.records(erased, required=True)
            others = [item.value for item in both.records(retained)]
            for fact in facts:
                yield {**fact.value, "retained": others[fact.index :: len(facts)]}
            return
    names = ", ".join(map(str, document)) if isinstance(document, Mapping) else type(document).__name__
    raise Malformed(f"expected the lists K_F and K_R, or success and locality, found {names or 'nothing'}")


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count the probes of each criterion, and the cases that have none."""
    kinds = Counter(probe.kind for case in cases for probe in case.probes)
    restated = kinds["restated"]
    kinds["same_subject"] += restated
    criteria = {**PORTABILITY, **LOCALITY}
    same = sum(is_answer(case.request.target, case.probes[0].before) for case in cases)
    kinds_of_criteria = {*criteria.values(), "restated"}
    bare = sum(not any(probe.kind in kinds_of_criteria for probe in case.probes) for case in cases)
    return {
        "probes by criterion": {name: kinds[kind] for name, kind in criteria.items() if kinds[kind]},
        "cases without criteria": bare,
        **({"requests whose target is the old answer": same} if same else {}),
        **({"locality questions that restate the edited fact": restated} if restated else {}),
    }


def fits(value: Any) -> bool:
    """Whether a record has the shape of one of the six sets, or a document is that of Sanitation."""
    if has(value, "K_F") or has(value, "success", "locality"):
        return True
    if has(value, "ent", "pos", "neg") or has(value, "text", "labels", "concept"):
        return True
    if has(value, "question", "ground_truth", "target_new"):
        return True
    groups = [value.get(path) for path in ("portability", "locality")] if has(value, "target_new") else []
    criteria = {name for group in groups if isinstance(group, Mapping) for name in group}
    return has(value, "subject", "prompt") and bool(criteria) and criteria <= {*PORTABILITY, *LOCALITY}


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the six sets apart by their fields; counterfactual facts have an old answer and no rephrasing."""
    first = records[0]
    if has(first, "labels", "concept"):
        return ("wikibio",)
    if has(first, "ent"):
        return ("convsent",)
    if has(first, "question"):
        return ("sanitation",)
    if any(has(record, "rephrase_prompt") or has(record, "cond") for record in records):
        return ("zsre",)
    return ("counterfact",) if any(record.get("ground_truth") for record in records) else ("recent",)


DATASET = Dataset(
    name="knowedit",
    title="KnowEdit",
    paper="A Comprehensive Study of Knowledge Editing for Large Language Models, 2024, arXiv 2401.01286",
    licence="MIT",
    home="Hugging Face dataset zjunlp/KnowEdit, folder benchmark",
    fits=fits,
    cases=cases,
    variants=("recent", "zsre", "wikibio", "counterfact", "convsent", "sanitation"),
    records=records,
    facts=facts,
    variants_of=variants_of,
    files={
        "recent": "recent_test.json",
        "zsre": "ZsRE-test-all.json",
        "wikibio": "wikibio-test-all.json",
        "counterfact": "test_cf.json",
        "convsent": "blender_test.json",
        "sanitation": "trivia_qa_test.json",
    },
    urls={
        "recent": f"{HUB}/wiki_recent/recent_test.json",
        "zsre": f"{HUB}/ZsRE/ZsRE-test-all.json",
        "wikibio": f"{HUB}/WikiBio/wikibio-test-all.json",
        "counterfact": f"{HUB}/wiki_counterfact/test_cf.json",
        "convsent": f"{HUB}/Convsent/blender_test.json",
        "sanitation": f"{HUB}/trivia/trivia_qa_test.json",
    },
)
