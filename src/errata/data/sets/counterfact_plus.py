"""CounterFact+: CounterFact's neighbourhood prompts with the edit prepended.

It has no file of its own: it is derived from a CounterFact file, in the authors' nested or EasyEdit's flat form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from errata.data._base import Dataset, Malformed, Record
from errata.data.sets._counterfact import (
    distracting_probes,
    flat,
    flat_rewrite,
    neighbourhood_probes,
    nested,
    rewrite,
)
from errata.data.sets._parts import efficacy, name_of
from errata.data.sets.counterfact import DATASET as COUNTERFACT
from errata.types import Case


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn a record of CounterFact into a case with plain and distracting neighbours. Raises Skip, Malformed."""
    name = f"counterfact_plus:{name_of(record, 'case_id')}"
    if nested(record.value):
        request, answer = rewrite(record, name), None
        prompts = record.texts("neighborhood_prompts", required=True)
    elif flat(record.value):
        request, answer = flat_rewrite(record, name), record.text("locality_ground_truth").strip()
        prompts = record.texts("locality_prompt", required=True)
    else:
        raise Malformed("expected a record of CounterFact, with requested_rewrite or with locality_prompt")
    probes = [
        efficacy(request),
        *neighbourhood_probes(request, prompts, answer=answer),
        *distracting_probes(request, prompts, answer),
    ]
    yield Case(name, request, tuple(probes))


def fits(value: Any) -> bool:
    """Always False: its files are CounterFact's, so this dataset must be named explicitly."""
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
