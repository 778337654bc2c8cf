"""CounterFact+: CounterFact's neighbours asked with the edit stated before them.

There is no file of its own: it is derived from one of CounterFact's, in the authors' form or EasyEdit's flat one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from errata.data._base import Dataset, Malformed, Record
from errata.data.sets._counterfact import distracting, flat, flat_rewrite, neighbours, nested, rewrite
from errata.data.sets._parts import efficacy, name_of
from errata.data.sets.counterfact import DATASET as COUNTERFACT
from errata.types import Case


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn a record of CounterFact into a case with plain and distracting neighbours. Raises Skip, Malformed."""
    name = f"counterfact_plus:{name_of(record, 'case_id')}"
    if nested(record.value):
        wanted, answer = rewrite(record, name), None
        prompts = record.texts("neighborhood_prompts", needed=True)
    elif flat(record.value):
        wanted, answer = flat_rewrite(record, name), record.text("locality_ground_truth").strip()
        prompts = record.texts("locality_prompt", needed=True)
    else:
        raise Malformed("expected a record of CounterFact, with requested_rewrite or with locality_prompt")
    probes = [
        efficacy(wanted),
        *neighbours(wanted, prompts, answer=answer),
        *distracting(wanted, prompts, answer),
    ]
    yield Case(name, wanted, tuple(probes))


def fits(value: Any) -> bool:
    """Claim no record: its file is CounterFact's, so this set is only had by name."""
    return False


DATASET = Dataset(
    name="counterfact_plus",
    title="CounterFact+",
    paper="Hoelscher-Obermaier et al., Detecting Edit Failures in Large Language Models, Findings of ACL 2023, "
    "arXiv 2305.17553",
    licence=COUNTERFACT.licence,
    home=f"derived from CounterFact, {COUNTERFACT.home}",
    fits=fits,
    cases=cases,
    variants=COUNTERFACT.variants,
    files=COUNTERFACT.files,
    urls=COUNTERFACT.urls,
    gate=COUNTERFACT.gate,
)
