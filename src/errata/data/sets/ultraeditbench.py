"""UltraEditBench: two million triples of Wikidata5M as questions.

Fields: ``prompt``, ``ans``, ``rephrase_prompt``, ``loc``/``loc_ans``. The method it was made for needs no
subject, so a row may name none: under the variant ``subject`` such a row is skipped, under ``whole`` the
whole question is used as the subject of every row, and editors that read at the subject's last token read at
the end of the question.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from errata.data._base import Dataset, Record, Skip, make_request
from errata.data.sets._parts import efficacy, has, locality_probe, name_of, question_request
from errata.data.sets.wikibigedit import pair
from errata.types import Case, Probe


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip or Malformed."""
    name = name_of(record, "id" if record.get("case_id") is None else "case_id")
    question, answer = record.text("prompt"), record.text("ans")
    if variant == "whole":
        request = question_request(question, answer, id=name)
    elif record.texts("subject"):
        request = make_request(question, record.text("subject"), answer, id=name)
    else:
        raise Skip("names no subject; ultraeditbench/whole lets the whole question be the subject")
    probes = [efficacy(request)]
    probes += [
        Probe("paraphrase", text.strip(), (request.target,), ()) for text in record.texts("rephrase_prompt")
    ]
    other = pair(record, "loc", "loc_ans")
    if other:
        probes.append(locality_probe("locality", other[0], (other[1],)))
    yield Case(f"ultraeditbench:{name}", request, tuple(probes))


def fits(value: Any) -> bool:
    """Whether a record has prompt, answer and the two further questions."""
    return has(value, "prompt", "rephrase_prompt", "ans", "loc", "loc_ans")


DATASET = Dataset(
    name="ultraeditbench",
    title="UltraEditBench",
    paper="UltraEdit: Training-, Subject-, and Memory-Free Lifelong Editing in Large Language Models, "
    "arXiv 2505.14679",
    licence="see the dataset card",
    home="hub XiaojieGu/UltraEditBench; as JSON lines or parquet files",
    fits=fits,
    cases=cases,
    variants=("subject", "whole"),
    files={"": "UltraEditBench_2M.json"},
)
