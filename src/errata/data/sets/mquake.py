"""MQuAKE: chains of facts of which some are edited, and questions that only the whole chain answers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from errata.data._base import Dataset, Malformed, Record, make_request
from errata.data.sets._parts import count, efficacy, has, name_of, rival_to, spellings
from errata.errors import DataError
from errata.types import Case, Probe, Request

HOST = "https://raw.githubusercontent.com/princeton-nlp/MQuAKE/main/datasets"
COUNTERFACTUAL = ("cf", "cf-3k", "cf-3k-v2")
HARD = 4
"""Edits, and hops, of every record of MQuAKE-hard."""
THOUGHTS = "Question: {question}\nThoughts:"
"""How the dataset's own demonstrations ask for a chain of thought."""


@dataclass(frozen=True)
class Rewrite:
    """One edited fact of a chain."""

    request: Request
    question: str
    """The fact asked as a question."""
    right: tuple[str, ...]
    """Spellings of the new answer."""
    before: tuple[str, ...]
    """Spellings of the old answer."""
    source: Record
    """The record it was read from."""


def rewrites(record: Record, case: str) -> list[Rewrite]:
    """Read the edited facts of a record. Raises Skip or Malformed.

    Aliases are stored with the single hops, not with the edits, and are looked up by question. A request's id
    is the case's with the edit's number and relation: ``"mquake:7.1 P27"``.
    """
    now, then = _answers(record, "new_single_hops"), _answers(record, "single_hops")
    edits = []
    for number, item in enumerate(record.records("requested_rewrite", required=True), 1):
        name = f"{case}.{number} {item.get('relation_id', '')}".strip()
        question = item.text("question").strip()
        new_request = make_request(
            item.text("prompt"),
            item.text("subject"),
            item.text("target_new.str"),
            item.text("target_true.str"),
            id=name,
        )
        right = spellings(new_request.target, _same(new_request.target, now.get(question, ())))
        old = new_request.target_old or ""
        before = spellings(old, _same(old, then.get(question, ())))
        edits.append(Rewrite(new_request, question, right, before, item))
    if not edits:
        raise Malformed("requested_rewrite: expected at least one edit, found none")
    return edits


def _answers(record: Record, path: str) -> dict[str, tuple[str, ...]]:
    """Map each single-hop question to the spellings of its answer."""
    return {
        hop.text("question").strip(): spellings(hop.text("answer"), hop.texts("answer_alias"))
        for hop in record.records(path, required=True)
    }


def _same(answer: str, aliases: tuple[str, ...]) -> tuple[str, ...]:
    """Return the aliases if they belong to this answer, else none: another fact may have the same question."""
    return aliases if answer in aliases else ()


def question_probes(edits: Sequence[Rewrite]) -> list[Probe]:
    """Ask each edited fact as a question."""
    return [
        Probe("question", e.question, e.right, e.before, rival_to(e.right, e.request.target_old, e.before))
        for e in edits
    ]


def chain_probes(record: Record, edits: Sequence[Rewrite]) -> list[Probe]:
    """Build the probes of a chain: each phrasing directly and by chain of thought, then each single hop.

    The phrasings form a group that is right if any of them is (the paper's rule; per-phrasing rows give the
    mean). The hops form a group that is right if all are. A hop that the record does not edit must keep its
    answer.
    """
    right = spellings(record.text("new_answer"), record.texts("new_answer_alias"))
    before = spellings(record.text("answer"), record.texts("answer_alias"))
    probes = [
        Probe("multi_hop", question, right, before, group="multi_hop")
        for question in record.texts("questions", required=True)
    ]
    probes += [
        replace(p, prompt=THOUGHTS.format(question=p.prompt), form="thought", group="thought") for p in probes
    ]
    edited = {edit.question: edit.before for edit in edits}
    for question, answers in _answers(record, "new_single_hops").items():
        old = edited.get(question, answers)
        probes.append(Probe("hop", question, answers, old, group="hops", need="all"))
    return probes


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case whose edits must all be in place together. Raises Skip or Malformed.

    The variants share a schema. Every row is a case with its edits. Not used: Remastered's labels in ``split``,
    which say in what setting a row is edited, and ``answer_extended`` of T.
    """
    name = f"mquake:{name_of(record, 'case_id')}"
    edits = rewrites(record, name)
    probes = [efficacy(edit.request, edit.right, edit.before) for edit in edits]
    probes += question_probes(edits) + chain_probes(record, edits)
    first, *others = (edit.request for edit in edits)
    yield Case(name, first, tuple(probes), tuple(others))


def with_demonstrations(cases: Sequence[Case], text: str) -> list[Case]:
    """Prepend few-shot demonstrations to the multi-hop questions, in the format of the demonstrations.

    ``text``: the content of ``multihop-prompts.txt`` (lines ``Q: .. A: ..``), for the questions answered
    directly, or of ``multihop-cot-prompts.txt`` (``Question: .. Thoughts: .. Answer: ..``), for those answered
    by chain of thought. Raises DataError for any other text, and where no case has such questions.
    """
    if re.search(r"^Question: .*\nThoughts: .*\nAnswer: ", text, re.MULTILINE):
        form, template = "thought", "{demonstrations}\n\n{prompt}"
    elif re.search(r"^Q: .* A: ", text, re.MULTILINE):
        form, template = "short", "{demonstrations}\nQ: {prompt} A:"
    else:
        raise DataError(
            f"the text {text[:40]!r}... has no demonstrations of multi-hop questions; expected lines "
            "'Q: ... A: ...', or blocks of 'Question:', 'Thoughts:' and 'Answer:'"
        )

    def demonstrate(probe: Probe) -> Probe:
        if probe.kind != "multi_hop" or probe.form != form:
            return probe
        prompt = template.format(demonstrations=text.strip(), prompt=probe.prompt)
        return replace(probe, prompt=prompt)

    new_cases = [replace(case, probes=tuple(demonstrate(probe) for probe in case.probes)) for case in cases]
    if new_cases == list(cases):
        raise DataError(f"no case has a multi-hop question of form {form!r} to put demonstrations before")
    return new_cases


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count edited facts, their relations, and cases by edits and by hops."""
    relations = {request.id.partition(" ")[2] for case in cases for request in case.requests if request.id}
    return {
        "edits": count(cases, "question"),
        "relations": len(relations - {""}),
        "cases by edits": dict(sorted(Counter(count([case], "question") for case in cases).items())),
        "cases by hops": dict(sorted(Counter(count([case], "hop") for case in cases).items())),
    }


def fits(value: Any) -> bool:
    """Whether a record has a chain of facts, and no passages written for them."""
    return is_chain(value) and not has(value["requested_rewrite"][0], "fact_new_uns")


def is_chain(value: Any) -> bool:
    """Whether a record has edits and the single hops of the edited chain."""
    if not has(value, "requested_rewrite", "questions", "new_answer", "new_single_hops"):
        return False
    edits = value["requested_rewrite"]
    return isinstance(edits, list) and bool(edits) and has(edits[0], "prompt", "subject", "target_new")


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Recognise T by its extended answers, Remastered by its splits, hard by four edits a record.

    The three counterfactual files hold records of each other, so only their names tell them apart.
    """
    chains = [record for record in records if is_chain(record)]
    if any("answer_extended" in record for record in chains):
        return ("t",)
    if any("split" in record for record in chains):
        return ("remastered",)
    if chains and all(len(record["requested_rewrite"]) == HARD for record in chains):
        return ("hard",)
    return COUNTERFACTUAL


DATASET = Dataset(
    name="mquake",
    title="MQuAKE",
    paper="MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions, EMNLP 2023, "
    "arXiv 2305.14795; MQuAKE-Remastered, ICLR 2025; hard: DeepEdit, arXiv 2401.10471",
    licence="MIT; Remastered: CC BY 4.0",
    home="GitHub princeton-nlp/MQuAKE, folder datasets; Remastered: Hugging Face dataset "
    "henryzhongsc/MQuAKE-Remastered, folder data",
    fits=fits,
    cases=cases,
    variants=(*COUNTERFACTUAL, "t", "remastered", "hard"),
    variants_of=variants_of,
    facts=facts,
    files={
        "cf": "MQuAKE-CF.json",
        "cf-3k": "MQuAKE-CF-3k.json",
        "cf-3k-v2": "MQuAKE-CF-3k-v2.json",
        "t": "MQuAKE-T.json",
        "remastered": "CF6334-00000-of-00001.parquet",
        "hard": "MQuAKE-hard.json",
    },
    urls={
        "cf": f"{HOST}/MQuAKE-CF.json",
        "cf-3k": f"{HOST}/MQuAKE-CF-3k.json",
        "cf-3k-v2": f"{HOST}/MQuAKE-CF-3k-v2.json",
        "t": f"{HOST}/MQuAKE-T.json",
        "remastered": "henryzhongsc/MQuAKE-Remastered:data/CF6334-00000-of-00001.parquet",
    },
)
