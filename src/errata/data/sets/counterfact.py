"""CounterFact: one false fact a record, with paraphrases, neighbours, and prompts that only run on.

Paraphrases keep the unrelated sentence they begin with: it is part of the published score. Attribute prompts ask
about subjects that have the new object anyway, and enter no score but their own.

The variant ``multi`` is for edits that stand together: a record that gives an earlier subject and relation another
object is left out. The authors' ``multi_counterfact.json`` is read under it too; the check says whether their rule
left any that this one finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record, Skip
from errata.data.sets._counterfact import asked_again, neighbours, nested, rewrite
from errata.data.sets._parts import CARRIED, efficacy, kept, name_of, plain_texts
from errata.types import Case, Probe

HOST = "https://rome.baulab.info/data/dsets"
MULTI = "multi"
ADDED = (
    *CARRIED, "prefix_distraction", "subject_specificity", "distracting_neighborhood_prompts", "unrelated_relation",
)  # fmt: skip
"""Fields that EVOKE and EasyEdit's sets add to its records."""


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; both variants alike. Raises Skip, Malformed."""
    name = f"counterfact:{name_of(record, 'case_id')}"
    wanted = rewrite(record, name)
    old = wanted.target_old
    probes = [
        efficacy(wanted),
        *asked_again(wanted, record.texts("paraphrase_prompts")),
        *neighbours(wanted, record.texts("neighborhood_prompts")),
        *(kept("attribute", prompt, (wanted.target,), old) for prompt in record.texts("attribute_prompts")),
        *(Probe("generation", p, (), (), form="open") for p in record.texts("generation_prompts")),
    ]
    yield Case(name, wanted, tuple(probes))


def gate(variant: str) -> Callable[[Record, Case], None]:
    """Refuse, in the variant ``multi``, what contradicts an earlier record: the same subject and relation."""
    first: dict[tuple[str, str], tuple[str, str]] = {}

    def admit(record: Record, case: Case) -> None:
        if variant != MULTI:
            return
        wanted = case.request
        relation = record.get("requested_rewrite.relation_id") or "".join(wanted.template)
        target, name = first.setdefault((wanted.subject, relation), (wanted.target, case.id))
        if target != wanted.target:
            raise Skip(
                f"contradicts {name}: {wanted.subject!r} was given {target!r} there, {wanted.target!r} here"
            )

    return admit


def fits(value: Any) -> bool:
    """Whether a record is CounterFact's: one edit and its neighbours, and no questions of sets made from it."""
    return (
        nested(value)
        and plain_texts(value.get("neighborhood_prompts"))
        and not any(n in value for n in ADDED)
    )


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count subjects, and what the requests are to become."""
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
