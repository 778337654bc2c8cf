"""Read requests in other tools' formats: ROME and MEMIT, CounterFact and MQuAKE, EasyEdit, and zsRE.

Nested records have one ``requested_rewrite`` or a list of them. Flat ones have ``prompt`` or ``src``, ``subject``,
and ``target_new`` or ``alt``; the old answer is ``ground_truth``, ``target_true``, ``target_old``, or the first of
``answers``. For zsRE the target is thus the alternative answer, as in the scripts of MEND and EasyEdit; the dataset
``zsre`` also has the convention of ROME. Probes in such records are ignored here; ``errata data export`` converts
them to a file of cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from errata.data._base import Malformed, Record, make_request
from errata.errors import shown
from errata.types import Request

PROMPTS, TARGETS = ("prompt", "src"), ("target_new", "alt")
OLD = ("ground_truth", "target_true", "target_old", "answers", "answer")
NAMES = ("case_id", "id")
NESTED = "requested_rewrite"
FIELDS = (*PROMPTS, "subject", *TARGETS, *OLD, *NAMES)
"""Names of a flat record's fields."""
SAMPLE = 20
"""Number of records read to recognise the dataset of a file."""

Reader = Callable[[Record], Sequence[Request]]


def reader(values: Sequence[Any]) -> Reader | None:
    """Return a reader for records in another tool's format; None where no format fits."""
    records = [value for value in values if isinstance(value, Mapping)]
    if records and (NESTED in records[0] or _flat(records[0])):
        return requests
    return _loader(records[:SAMPLE]) if records else None


def requests(record: Record) -> list[Request]:
    """Read the requests of a nested or flat record. Raises Skip saying what is wrong with it."""
    value = record.value
    if not isinstance(value, Mapping):
        raise Malformed(f"expected a record of fields, found {type(value).__name__}")
    name = next((str(value[n]) for n in NAMES if isinstance(value.get(n), (str, int))), None)
    if NESTED not in value:
        return [_request(record, name)]
    inner = value[NESTED]
    parts = inner if isinstance(inner, list) else [inner]
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        raise Malformed(f"{NESTED}: expected fields, found {shown(inner, 60)}")
    return [_request(Record(part, record.where, record.index), name) for part in parts]


def _flat(value: Mapping[str, Any]) -> bool:
    return (
        "target" not in value
        and "subject" in value
        and any(n in value for n in PROMPTS)
        and any(n in value for n in TARGETS)
    )


def _request(record: Record, name: str | None) -> Request:
    prompt, target = _first(record, PROMPTS), _first(record, TARGETS)
    missing = [" or ".join(names) for names, value in ((PROMPTS, prompt), (TARGETS, target)) if value is None]
    if missing:
        raise Malformed(f"missing {', '.join(missing)}")
    old = _first(record, OLD)
    old = None if old == target else old
    return make_request(str(prompt), record.text("subject"), str(target), old, id=name)


def _first(record: Record, names: Sequence[str]) -> str | None:
    """Return the text of the first non-empty field; None where there is none."""
    for name in names:
        value = record.get(name)
        if value not in (None, "", []):
            return _text(name, value)
    return None


def _text(name: str, value: Any) -> str:
    """Return a text, that of ``{"str": text}``, or the first of a list. Raises Malformed for anything else."""
    text = value
    for _ in range(3):  # some files have lists of lists
        if isinstance(text, Mapping) and "str" in text:
            text = text["str"]
        elif isinstance(text, list) and text:
            text = text[0]
    if not isinstance(text, str) or not text.strip():
        raise Malformed(f"{name}: expected a text, found {type(value).__name__} {shown(value, 60)}")
    return text


def _loader(sample: Sequence[Mapping[str, Any]]) -> Reader | None:
    """Return a reader for the only dataset whose fields all sampled records have; None where there is no such one."""
    from errata.data.sets import REGISTRY

    entries = [REGISTRY.get(name) for name in REGISTRY]
    matches = [entry for entry in entries if all(entry.fits(value) for value in sample)]
    if len(matches) != 1:
        return None
    entry = matches[0]

    def read(record: Record) -> list[Request]:
        return [request for case in entry.cases(record, entry.variants[0]) for request in case.requests]

    return read
