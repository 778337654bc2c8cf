"""HalluEditBench: corrections of Wikidata facts that a model hallucinates, with nine kinds of questions.

A row of its CSV files has ``subject``, ``object`` (the right answer), ``question``, and the model's wrong answer in a
column ``output_`` with the model's name, which is the old answer. Asked are: ``paraphrased_question``; ``yes_question``
and ``no_question`` (a choice of Yes and No); ``multiple_choice_with_letters`` with the right letter in
``multiple_choice_labels``; ``reversed_relation_question``, whose answer is the subject; and ``question_2hop`` to
``question_6hop`` with their answers.

``locality_question`` comes without an answer: the paper compares the model's outputs before and after. A probe needs
an answer, so these questions are not used; the check counts them. Also not used: ``topic``, ``relation``,
``multiple_choices`` (the choices once more) and ``eval_`` of the model's answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record, make_request
from errata.data.sets._parts import choice, efficacy, has, name_of, refuse_unchanged, rival_to, spellings
from errata.types import Case, Probe, Request

OUTPUT = "output_"
HOPS = {2: "two_hop", 3: "three_hop", 4: "four_hop", 5: "five_hop", 6: "six_hop"}
JUDGEMENTS = ("Yes", "No")
_LETTER = re.compile(r"(?<!\w)([A-H])[.)]\s")


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one row into a case. Raises Skip or Malformed."""
    name = f"hallueditbench:{_topic(record)}{name_of(record)}"
    old = _output(record)
    refuse_unchanged(record.text("object"), (old,) if old else ())
    request = make_request(
        record.text("question"), record.text("subject"), record.text("object"), old, id=name
    )
    yield Case(name, request, (efficacy(request), *_probes(record, request)))


def _topic(record: Record) -> str:
    topic = record.texts("topic")
    return f"{topic[0].strip()}/" if topic else ""


def _output(record: Record) -> str | None:
    columns = [name for name in record.value if str(name).startswith(OUTPUT)]
    answers = [text for name in columns for text in record.texts(name)]
    return answers[0].strip() if answers else None


def _probes(record: Record, request: Request) -> Iterator[Probe]:
    old = request.target_old
    old_answers = (old,) if old else ()
    for text in record.texts("paraphrased_question"):
        yield Probe(
            "paraphrase", text.strip(), (request.target,), old_answers, rival_to((request.target,), old)
        )
    for field, answer in (("yes_question", "Yes"), ("no_question", "No")):
        for text in record.texts(field):
            yield choice("yes_no", f"{text.strip()}\nAnswer:", answer, JUDGEMENTS)
    for text in record.texts("multiple_choice_with_letters"):
        letters = tuple(_LETTER.findall(text))
        prompt = f"{request.text}\n{text.strip()}\nAnswer:"
        yield choice("multiple_choice", prompt, record.text("multiple_choice_labels").strip(), letters)
    for text in record.texts("reversed_relation_question"):
        yield Probe("inverse", text.strip(), (request.subject,), ())
    for hops, kind in HOPS.items():
        for text in record.texts(f"question_{hops}hop"):
            answers = spellings("", record.texts(f"answer_{hops}hop"))
            if answers:
                yield Probe(kind, text.strip(), answers, ())
            else:
                record.omissions[f"questions of {hops} hops without an answer"] += 1
    record.omissions["locality questions, which have no answer"] += len(record.texts("locality_question"))


def fits(value: Any) -> bool:
    """Whether a row has the question in its many forms."""
    return has(value, "subject", "object", "question", "paraphrased_question", "yes_question", "no_question")


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count cases by topic."""
    topics = Counter(case.id.partition(":")[2].rpartition("/")[0] for case in cases)
    return {"rows by topic": dict(sorted(topics.items()))}


DATASET = Dataset(
    name="hallueditbench",
    title="HalluEditBench",
    paper="Can Knowledge Editing Really Correct Hallucinations?, ICLR 2025, arXiv 2410.16251",
    licence="MIT (repository)",
    home="GitHub llm-editing/HalluEditBench, data/questions/hallucination_final, a CSV file a topic and model",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "health_disease.csv"},
)
