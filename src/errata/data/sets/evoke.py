"""EVOKE: does the edited model overfit to the target? Questions to which the target is a wrong answer.

The main file asks what follows from the edit (``portability``, may be empty), neighbours, and neighbours after the
edit was stated (``prefix_distraction``); the subject file asks for another relation of the same subject. In all of
them the edit's target is the rival. The fields decide which of the two a record is; the variant names the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record
from errata.data.sets._counterfact import neighbourhood_probes, nested, paraphrase_probes, rewrite
from errata.data.sets._parts import count, efficacy, has, locality_probe, name_of, spellings
from errata.types import Case, Probe, Request

MAIN, SUBJECT = "main", "subject"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip, Malformed."""
    file = SUBJECT if has(record.value, "subject_specificity") else MAIN
    if variant and variant != file:
        raise Malformed(f"expected a record of the {variant} file, found one of the {file} file")
    name = f"evoke:{name_of(record, 'case_id')}"
    request = rewrite(record, name)
    more = _same_subject(record, request) if file == SUBJECT else _main(record, request)
    yield Case(name, request, (efficacy(request), *more))


def _main(record: Record, request: Request) -> Iterator[Probe]:
    yield from paraphrase_probes(request, record.texts("paraphrase_prompts"))
    yield from neighbourhood_probes(request, record.texts("neighborhood_prompts"))
    question = record.get("portability.New Question")
    if isinstance(question, str) and question.strip():
        right = spellings(record.text("portability.New Answer"))
        yield Probe("multi_hop", question, right, (), None if request.target in right else request.target)
    yield from neighbourhood_probes(request, record.texts("prefix_distraction"), "distracting")


def _same_subject(record: Record, request: Request) -> Iterator[Probe]:
    right = spellings(
        record.text("subject_specificity.answer.value"), record.texts("subject_specificity.answer.aliases")
    )
    yield locality_probe("same_subject", record.text("subject_specificity.prompt"), right, request.target)


def fits(value: Any) -> bool:
    """Whether a record is of either file."""
    return nested(value) and ("prefix_distraction" in value or "subject_specificity" in value)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count the cases with a multi-hop question."""
    return {"with multi-hop question": count(cases, "multi_hop")}


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the subject file by its questions; of the main file, or of both mixed, the plain name is the variant."""
    return (SUBJECT,) if all(has(record, "subject_specificity") for record in records) else ("",)


DATASET = Dataset(
    name="evoke",
    title="EVOKE",
    paper="Zhang et al., Uncovering Overfitting in Large Language Model Editing, ICLR 2025, arXiv 2410.07819",
    licence="not stated",
    home="the repository named in the paper, arXiv 2410.07819",
    fits=fits,
    cases=cases,
    variants=("", MAIN, SUBJECT),
    facts=facts,
    files={"": "evoke_main.json", MAIN: "evoke_main.json", SUBJECT: "evoke_subject.json"},
    variants_of=variants_of,
)
