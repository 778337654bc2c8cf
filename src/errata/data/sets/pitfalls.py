"""Pitfalls of knowledge editing: edits that contradict an earlier one (ConflictEdit) or undo it (RoundEdit).

An edit is ``{relation{prompt, query}, subject, object, new_object}``, entities with their ``label``.

ConflictEdit (``reverse``, ``composite``): a record has ``edits``, two of them, of which the second contradicts what the
first implies by a ``rule``, among the facts ``triples``; ``prerequisites`` are the numbers of those that the rule needs
and that are not edited. RoundEdit (``round``): a record has one ``edit`` of a fact with several right answers,
``true_objects``, which is made and then taken back.

Both are about edits one after the other, so a record gives two cases, ``NAME.1`` and ``NAME.2``, to be run under the
schedule ``sequential:2``; the questions stand with the second. ``conflict`` asks for its answer against the one that
the first edit implies (the paper's conflict score); ``prerequisite`` must stay. After a round trip ``true_object`` asks
for each of the other right answers, which must be likelier than the one that came and went (the paper's ignore rate).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, make_request
from errata.data.sets._parts import count, efficacy, has, locality_probe, name_of, rival_to
from errata.types import Case, Probe, Request

REVERSE, COMPOSITE, ROUND = "reverse", "composite", "round"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into two cases, by its shape; the variant only names the file. Raises Skip or Malformed."""
    name = f"pitfalls:{name_of(record)}"
    if has(record.value, "edit"):
        yield from _round(record, name)
        return
    items = record.records("edits", required=True)
    if len(items) != 2:
        raise Malformed(f"edits: expected two edits, found {len(items)}")
    first, second = (_request(item, f"{name}.{number}") for number, item in enumerate(items, 1))
    composite = record.get("type") == COMPOSITE
    implied = first.target if composite else second.target_old  # by the rule: the first edit's own subject
    rival = rival_to((second.target,), implied)
    conflict = Probe("conflict", second.text, (second.target,), (), rival)
    yield Case(f"{name}.1", first, (efficacy(first),))
    yield Case(f"{name}.2", second, (efficacy(second), conflict, *_prerequisites(record)))


def _request(item: Record, name: str, *, back: bool = False) -> Request:
    """Read an edit; ``back``: the one that takes it back."""
    new, old = item.text("new_object.label"), item.text("object.label")
    target, before = (old, new) if back else (new, old)
    return make_request(item.text("relation.prompt"), item.text("subject.label"), target, before, id=name)


def _prerequisites(record: Record) -> Iterator[Probe]:
    triples, numbers = record.records("triples"), record.get("prerequisites") or []
    if not isinstance(numbers, list) or not all(
        isinstance(n, int) and 0 <= n < len(triples) for n in numbers
    ):
        raise Malformed(
            f"prerequisites: expected numbers of the {len(triples)} triples, found {numbers!r:.60}"
        )
    for number in numbers:
        triple = triples[number]
        fact = make_request(
            triple.text("relation.prompt"), triple.text("subject.label"), triple.text("object.label")
        )
        yield locality_probe("prerequisite", fact.text, (fact.target,))


def _round(record: Record, name: str) -> Iterator[Case]:
    edit = Record(record.get("edit"), f"{record.where}, edit", record.index, record.omissions)
    there, back = _request(edit, f"{name}.1"), _request(edit, f"{name}.2", back=True)
    others = [item.text("label").strip() for item in record.records("true_objects", required=True)]
    probes = [
        locality_probe("true_object", back.text, (label,), there.target)
        for label in dict.fromkeys(others)
        if label != back.target
    ]
    yield Case(f"{name}.1", there, (efficacy(there),))
    yield Case(f"{name}.2", back, (efficacy(back), *probes))


def fits(value: Any) -> bool:
    """Whether a record is of one of the two sets."""
    return has(value, "rule", "edits", "triples") or has(value, "edit", "true_objects")


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the files by the type that records name, and RoundEdit by its shape."""
    if any(has(record, "true_objects") for record in records):
        return (ROUND,)
    return (COMPOSITE,) if any(has(r, "type") and r["type"] == COMPOSITE for r in records) else (REVERSE,)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count pairs of edits and what is asked of them."""
    kinds = Counter(probe.kind for case in cases for probe in case.probes)
    names = ("conflict", "prerequisite", "true_object")
    return {"pairs of edits": count(cases, "efficacy") // 2, **{k: kinds[k] for k in names if kinds[k]}}


DATASET = Dataset(
    name="pitfalls",
    title="ConflictEdit and RoundEdit",
    paper="Unveiling the Pitfalls of Knowledge Editing for Large Language Models, ICLR 2024, arXiv 2310.02129",
    licence="MIT (repository)",
    home="GitHub zjunlp/PitfallsKnowledgeEditing, data",
    fits=fits,
    cases=cases,
    variants=(REVERSE, COMPOSITE, ROUND),
    facts=facts,
    files={REVERSE: "reverse_edit.json", COMPOSITE: "composite_edit.json", ROUND: "easy.json"},
    variants_of=variants_of,
)
