"""CounterFact: one counterfactual per record, with paraphrases, neighbours, attribute and generation prompts.

Paraphrase prompts keep the unrelated sentence they begin with: the published scores include it. Attribute prompts are
about subjects that have the new object anyway; they count only in the score of their own kind.

The variant ``multi`` is for edits applied together: a record that gives an earlier (subject, relation) pair another
object is skipped. Use it for the authors' ``multi_counterfact.json`` too; the check lists any conflict that remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record, Skip
from errata.data.sets._counterfact import neighbourhood_probes, nested, paraphrase_probes, rewrite
from errata.data.sets._parts import (
    LOCALITY_FIELDS,
    PORTABILITY_FIELDS,
    efficacy,
    locality_probe,
    name_of,
    plain_texts,
)
from errata.types import Case, Probe

HOST = "https://rome.baulab.info/data/dsets"
MULTI = "multi"
OTHER_SETS_FIELDS = (
    *PORTABILITY_FIELDS, *LOCALITY_FIELDS, "prefix_distraction", "subject_specificity",
)  # fmt: skip
"""Fields that EVOKE and EasyEdit's sets add to its records."""


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; both variants alike. Raises Skip, Malformed."""
    name = f"counterfact:{name_of(record, 'case_id')}"
    request = rewrite(record, name)
    old = request.target_old
    probes = [
        efficacy(request),
        *paraphrase_probes(request, record.texts("paraphrase_prompts")),
        *neighbourhood_probes(request, record.texts("neighborhood_prompts")),
        *(
            locality_probe("attribute", prompt, (request.target,), old)
            for prompt in record.texts("attribute_prompts")
        ),
        *(Probe("generation", p, (), (), form="open") for p in record.texts("generation_prompts")),
    ]
    yield Case(name, request, tuple(probes))


def gate(variant: str) -> Callable[[Record, Case], None]:
    """Refuse, in the variant ``multi``, what contradicts an earlier record: the same subject and relation."""
    first: dict[tuple[str, str], tuple[str, str]] = {}

    def admit(record: Record, case: Case) -> None:
        if variant != MULTI:
            return
        request = case.request
        relation = record.get("requested_rewrite.relation_id") or "".join(request.template)
        target, name = first.setdefault((request.subject, relation), (request.target, case.id))
        if target != request.target:
            raise Skip(
                f"contradicts {name}: {request.subject!r} was given {target!r} there, {request.target!r} here"
            )

    return admit


def fits(value: Any) -> bool:
    """Whether a record is CounterFact's: one edit and its neighbours, and no questions of sets made from it."""
    return (
        nested(value)
        and plain_texts(value.get("neighborhood_prompts"))
        and not any(n in value for n in OTHER_SETS_FIELDS)
    )


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count distinct subjects and distinct new objects."""
    return {
        "subjects": len({case.request.subject for case in cases}),
        "objects": len({case.request.target for case in cases}),
    }


DATASET = Dataset(
    name="counterfact",
    title="CounterFact",
    paper="Meng et al., Locating and Editing Factual Associations in GPT, NeurIPS 2022, arXiv 2202.05262; multi: "
    "Meng et al., Mass-Editing Memory in a Transformer, ICLR 2023, arXiv 2210.07229",
    licence="not stated for the data; the authors' code is MIT",
    home=f"{HOST}/counterfact.json and https://memit.baulab.info/data/dsets/multi_counterfact.json",
    fits=fits,
    cases=cases,
    variants=("", MULTI),
    facts=facts,
    files={"": "counterfact.json", MULTI: "multi_counterfact.json"},
    urls={
        "": f"{HOST}/counterfact.json",
        MULTI: "https://memit.baulab.info/data/dsets/multi_counterfact.json",
    },
    gate=gate,
)
