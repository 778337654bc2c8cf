"""Validate the documents of a run folder; the first wrong field is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from errata.errors import DataError, shown

Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _scalar(value: Any) -> bool:
    return isinstance(value, (str, bool)) or _whole(value) or isinstance(value, float)


def _fields(value: Any) -> bool:
    return isinstance(value, Mapping)


def _each(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _values(check: Check) -> Check:
    """Build a check of all values of a record."""
    return lambda value: isinstance(value, Mapping) and all(map(check, value.values()))


def _of(needed: tuple[str, ...] = (), **checks: Check) -> Check:
    """Build a check of a record: fields that must be there, and what those that are there and not null must be."""

    def check(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and all(name in value for name in needed)
            and all(value.get(name) is None or right(value[name]) for name, right in checks.items())
        )

    return check


_MEASURE = _of(n=_whole, ci=_each(lambda end: end is None or _scalar(end)))
_ROW = _of(
    ("kind", "prompt", "protocol", "before", "after"),
    kind=_text, prompt=_text, protocol=_text, before=_scalar, after=_scalar,
    detail=_of(answers=_each(_scalar), text_before=_text, text_after=_text),
)  # fmt: skip
_TABLE_ROW = _of(scores=_values(_scalar))

RUN: Mapping[str, Check] = {
    "name": _scalar,
    "versions": _fields,
    "hardware": _of(gpus=_each(lambda gpu: _scalar(gpu) or _fields(gpu))),
    "threads": _whole,
    "datasets": _values(_fields),
    "published": _each(_of(rows=_each(_TABLE_ROW))),
}
PLAN: Mapping[str, Check] = {
    "model": _scalar,
    "method": _text,
    "label": _text,
    "dataset": _scalar,
    "settings": _fields,
    "schedule": _text,
    "seed": _scalar,
    "baseline": lambda value: isinstance(value, bool),
    "rank": _whole,
    "role": _text,
}
CELL: Mapping[str, Check] = {
    "id": _text,
    "status": _text,
    "reason": _text,
    "tag": _values(lambda value: value is None or _scalar(value)),
    "summary": _values(_MEASURE),
    "looks": _each(_of(("edits",), edits=_whole, collapse=_of(alarm=_each(_scalar)),
                       norm_ratio=lambda value: _scalar(value) or _values(_scalar)(value))),
    "scores": _values(lambda value: value is None or _scalar(value)),
    "cost": _of(fit=_fields, observe=_fields, latency_overhead=_fields),
    "host": _fields,
    "refused_cases": _each(_of(("case", "reason"))),
}  # fmt: skip
JUDGED: Mapping[str, Check] = {"judge": _fields, "agreement": _fields, "summary": _values(_MEASURE)}
LINE: Mapping[str, Check] = {"case": _scalar, "edits": _whole, "rows": _each(_ROW)}


def check(document: Mapping[str, Any], shape: Mapping[str, Check], where: str | Path) -> None:
    """Raise DataError naming the first field that is of another form than a report can take; null says nothing."""
    for name, right in shape.items():
        value = document.get(name)
        if value is not None and not right(value):
            raise DataError(
                f"{where} is damaged: {name} is of another form than errata writes, found {shown(value)}"
            )
