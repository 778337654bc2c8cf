"""UnKEBench: questions answered with a passage, a paraphrase of each, and sub-questions on its content."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record
from errata.data.sets._parts import count, has, long_answer, mean_words, name_of, question_request
from errata.types import Case


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case of long probes. Raises Skip or Malformed.

    No subject is given: the whole question is used as the subject. The answers to sub-questions are sentences, so
    these are compared like the long answer, not matched like a name.
    """
    name = f"unke:{name_of(record)}"
    answer = record.text("answer")
    request = question_request(record.text("question"), answer, id=name)
    parts, replies = record.texts("sub_question"), record.texts("sub_answer")
    if not len(parts) == len(replies) == len(record.get("sub_question") or ()):
        raise Malformed(
            f"sub_answer: expected an answer to each sub-question and none empty, found {len(parts)} questions "
            f"and {len(replies)} answers"
        )
    probes = [
        long_answer("long", request.text, answer),
        long_answer("long_paraphrase", record.text("para_question").strip(), answer),
    ]
    probes += [
        long_answer("sub_question", part.strip(), reply) for part, reply in zip(parts, replies, strict=True)
    ]
    yield Case(name, request, tuple(probes))


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count sub-questions, rows by their number, and the mean words of an answer."""
    numbers = Counter(count([case], "sub_question") for case in cases)
    return {
        "sub-questions": count(cases, "sub_question"),
        "rows by sub-questions": dict(sorted(numbers.items())),
        "mean answer words": mean_words(cases),
    }


def fits(value: Any) -> bool:
    """Whether a record is a question with a paraphrase, an answer and sub-questions."""
    return has(value, "question", "para_question", "answer", "sub_question", "sub_answer")


DATASET = Dataset(
    name="unke",
    title="UnKEBench",
    paper="Everything is Editable: Extend Knowledge Editing to Unstructured Data in Large Language Models, "
    "ICLR 2025, arXiv 2405.15349",
    licence="not stated",
    home="GitHub jianghoucheng/AnyEdit, data/UnKE/final_data_v2.json",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "unke_v2.json"},
)
