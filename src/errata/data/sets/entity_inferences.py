"""Entity Inferences: what follows from an entity's definition, as a choice among labels.

A record is one of ECBD's (see :mod:`errata.data.sets.ecbd`) whose probe sentences list ``labels``; ``label``
is the right one. The authors choose the label with the highest summed log-probability given the text before
the span; the words after it have no effect in a causal model. ``explicit`` files ask for an
attribute the definition states, ``implicit`` ones for what follows from it. Not used: ``attribute`` (the
masked word of the definition), ``category``, ``qid``, and ``generic_sentences`` and ``specific_sentences``
(common sense about the class and the attribute, meant for training).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record
from errata.data.sets._parts import has
from errata.data.sets.ecbd import READINGS, Cloze, edit, efficacy, sentences, unmarked
from errata.types import Case, Probe


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; the variant is a reading of its definition. Raises Skip or Malformed."""
    request = edit(record, variant)
    right = record.text("label").strip()
    probes = tuple(_choice(sentence, right) for sentence in sentences(record))
    yield Case(f"entity_inferences:{record.text('ex_id')}", request, (efficacy(request), *probes))


def _choice(sentence: Record, right: str) -> Probe:
    fillings = sentence.texts("labels", required=True)
    labels = tuple(dict.fromkeys(unmarked(filling) for filling in fillings))
    if right not in labels:
        raise Malformed(f"the label {right!r} is none of those to choose from: {', '.join(labels)}")
    cloze = Cloze.read(sentence.text("probe_sentence"), right)
    return Probe("entity", cloze.prompt, (right,), (), form="choice", choices=labels)


def fits(value: Any) -> bool:
    """Whether a record is a definition with common sense about its entity."""
    return has(value, "definition", "def_target", "generic_sentences")


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count rows by the beginning of their names, which tells the kind of entity."""
    kinds = [case.id.partition(":")[2].rpartition("_dev_")[0] for case in cases]
    return {f"rows {kind}_dev_*": kinds.count(kind) for kind in dict.fromkeys(kinds)}


DATASET = Dataset(
    name="entity_inferences",
    title="Entity Inferences",
    paper="Can LMs Learn New Entities from Descriptions? Challenges in Propagating Injected Knowledge, "
    "ACL 2023, arXiv 2305.01651",
    licence="not stated",
    home="GitHub yasumasaonoe/entity_knowledge_propagation, data/entity_inferences",
    fits=fits,
    cases=cases,
    variants=READINGS,
    facts=facts,
    files={"": "entity_inferences/disaster_explicit_attribute_independent.json"},
)
