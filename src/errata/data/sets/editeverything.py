"""EditEverything: long answers in seven formats, from proofs to poems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record
from errata.data.sets._parts import has, long_answer, mean_words, name_of, question_request
from errata.types import Case


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case with one long probe. Raises Skip or Malformed.

    No subject is given: the whole question is used as the subject. There are no paraphrases, sub-questions or
    locality probes, so only recall is measured. The category ends the request's id.
    """
    name = f"editeverything:{name_of(record)}"
    answer = record.text("answer")
    request = question_request(record.text("question"), answer, id=f"{name} {record.text('category')}")
    yield Case(name, request, (long_answer("long", request.text, answer),))


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count rows and mean answer words by category, and questions that repeat an earlier one."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.request.id or "").partition(" ")[2], []).append(case)
    prompts = Counter(case.request.text for case in cases)
    return {
        "rows by category": {name: len(group) for name, group in sorted(groups.items())},
        "mean answer words": {name: mean_words(group) for name, group in sorted(groups.items())},
        "repeated questions": sum(number - 1 for number in prompts.values()),
    }


def fits(value: Any) -> bool:
    """Whether a record is a question with an answer and a category, and nothing to ask besides."""
    return has(value, "question", "answer", "category") and not has(value, "sub_question")


DATASET = Dataset(
    name="editeverything",
    title="EditEverything",
    paper="AnyEdit: Edit Any Knowledge Encoded in Language Models, ICML 2025, arXiv 2502.05628",
    licence="not stated",
    home="GitHub jianghoucheng/AnyEdit, data/editevery.json",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "editeverything.json"},
)
