"""CounterFact in EasyEdit's flat form: one paraphrase and one neighbour a record.

Scores over one neighbour are not comparable with those over the ten of the authors' file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record
from errata.data.sets._counterfact import flat, flat_rewrite, neighbourhood_probes, paraphrase_probes
from errata.data.sets._parts import efficacy, name_of
from errata.types import Case


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip, Malformed."""
    name = f"counterfact_edit:{name_of(record, 'case_id')}"
    request = flat_rewrite(record, name)
    neighbour = record.text("locality_ground_truth").strip()
    probes = [
        efficacy(request),
        *paraphrase_probes(request, record.texts("rephrase_prompt")),
        *neighbourhood_probes(request, record.texts("locality_prompt"), answer=neighbour),
    ]
    yield Case(name, request, tuple(probes))


def fits(value: Any) -> bool:
    """Whether a record is flat CounterFact, and carries none of the later portability questions."""
    return flat(value) and "rephrase_prompt" in value and "portability" not in value


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count subjects, and targets of one word."""
    return {
        "subjects": len({case.request.subject for case in cases}),
        "targets of one word": sum(len(case.request.target.split()) == 1 for case in cases),
    }


DATASET = Dataset(
    name="counterfact_edit",
    title="CounterFact, EasyEdit's flat form",
    paper="Meng et al., NeurIPS 2022, arXiv 2202.05262; split of Yao et al., EMNLP 2023, arXiv 2305.13172",
    licence="not stated for the data; repositories that carry it: Apache-2.0, MIT",
    home="EasyEdit's data archive, counterfact/counterfact-edit.json (its README links it); a copy is in the GitHub "
    "repository WanliYoung/Revisit-Editing-Evaluation",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "counterfact-edit.json"},
)
