"""Read the header of an edit file with type checks; the first wrong field is reported by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard, cast

from errata.types import ConceptRecord, ImageRecord, Picture, Request

NAMES: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether a value read from JSON is an object; its keys are texts then."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether a value read from JSON is a list."""
    return isinstance(value, list)


def get_field(holder: Any, name: str, kind: type, where: str) -> Any:
    """Return a field of an object. Raises ValueError if it is missing or of another type."""
    if not is_object(holder) or name not in holder:
        raise ValueError(f"{where} has no {name}")
    return check_type(holder[name], kind, f"{where}: {name}")


def check_type(value: Any, kind: type, where: str) -> Any:
    """Return a value of a type, else raise ValueError; whole numbers count as numbers, true and false do not."""
    own = _type(value)
    if kind is float:
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf
    else:
        fine = own is kind
    if not fine:
        actual = "no finite number" if isinstance(value, float) else NAMES.get(own, "nothing")
        raise ValueError(f"{where}: expected {NAMES[kind]}, found {actual}")
    return float(value) if kind is float else value


def _type(value: object) -> type[object]:
    return type(value)


def get_texts(holder: Any, name: str, where: str) -> tuple[str, ...]:
    """Return a field that is a list of texts."""
    listed = get_field(holder, name, list, where)
    return tuple(check_type(item, str, f"{where}: {name}[{i}]") for i, item in enumerate(listed))


def provenance_fields(stored: Any) -> dict[str, Any]:
    """Return the fields of a provenance. Raises ValueError for missing, unknown or mistyped ones."""
    where = "provenance"
    kinds = {
        "method": str, "config": dict, "host": str, "host_name": str, "seed": int, "versions": dict,
        "notes": dict, "prompt_format": dict, "created": str,
    }  # fmt: skip
    optional = {"host_name", "seed", "versions", "notes", "prompt_format", "created"}
    check_type(stored, dict, where)
    unknown = sorted(set(stored) - {*kinds, "requests", "parents", "overrides"})
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0][:80]!r}")
    values = {n: get_field(stored, n, k, where) for n, k in kinds.items() if n in stored or n not in optional}
    for name, version in values.get("versions", {}).items():
        check_type(version, str, f"{where}: versions[{name[:80]!r}]")
    requests = get_field(stored, "requests", list, where)
    values["requests"] = tuple(_request(item, f"{where}: requests[{i}]") for i, item in enumerate(requests))
    values["parents"] = get_texts(stored, "parents", where) if "parents" in stored else ()
    if stored.get(
        "overrides"
    ):  # of files before version 3, whose edits recorded what they were applied against
        values["notes"] = {
            **values.get("notes", {}),
            "overrides": list(get_texts(stored, "overrides", where)),
        }
    return values


def _request(stored: Any, where: str) -> Request | ImageRecord | ConceptRecord:
    check_type(stored, dict, where)
    if "labels" in stored:
        return _concept(stored, where)
    text = "prompt" in stored
    needed = ("prompt", "subject", "target") if text else ("concept", "replacement", "digest")
    optional = ("target_old", "id", "language", "valid_from") if text else ("id",)
    unknown = sorted(set(stored) - {*needed, *optional} - ({"image", "indirect"} if text else {"pairs"}))
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0][:80]!r}")
    fields = {name: get_field(stored, name, str, where) for name in needed}
    for name in optional:
        if stored.get(name) is not None:
            fields[name] = get_field(stored, name, str, where)
    if not text:
        return ImageRecord(**fields, pairs=get_field(stored, "pairs", int, where))
    pictures = _pictures(stored.get("image"), where)
    indirect = get_texts(stored, "indirect", where) if "indirect" in stored else ()
    image = pictures[0] if pictures else None
    return Request(**fields, indirect=indirect, image=image, more_images=pictures[1:])


def _pictures(stored: Any, where: str) -> tuple[Picture, ...]:
    """Return the pictures of a request: none, one, or a list of several."""
    records = cast("list[Any]", stored) if isinstance(stored, list) else [] if stored is None else [stored]
    try:
        return tuple(Picture.restore(check_type(record, dict, where)) for record in records)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _concept(stored: Any, where: str) -> ConceptRecord:
    unknown = sorted(set(stored) - {"name", "labels", "digest"})
    if unknown:
        raise ValueError(f"{where}: unknown field {unknown[0][:80]!r}")
    labels = get_field(stored, "labels", dict, where)
    counts = {
        name: check_type(count, int, f"{where}: labels[{name[:80]!r}]") for name, count in labels.items()
    }
    return ConceptRecord(
        get_field(stored, "name", str, where), counts, get_field(stored, "digest", str, where)
    )


def record_fields(facts: Any, where: str, requests: int) -> dict[str, Any]:
    """Return the facts of a record. Raises ValueError for mistyped ones and for requests that do not exist."""
    groups = get_field(facts, "requests", list, where)
    for group in groups:
        for number in check_type(group, list, f"{where}: requests"):
            if not 0 <= check_type(number, int, f"{where}: requests") < requests:
                raise ValueError(f"{where}: serves request {number % 10**12}, and there are {requests}")
    stored = get_field(facts, "in_cost", list, where) if "in_cost" in facts else list[Any]()
    in_cost = [bool(check_type(one, bool, f"{where}: in_cost")) for one in stored]
    if in_cost and (len(in_cost) != len(groups) or all(in_cost)):
        raise ValueError(
            f"{where}: in_cost does not tell which of {len(groups)} columns are terms of the cost"
        )
    return {
        "gamma": get_field(facts, "gamma", float, where),
        "metric": get_field(facts, "metric", str, where),
        "requests": groups,
        "solves": get_field(facts, "solves", bool, where),
        "price": get_field(facts, "price", float, where),
        "in_cost": in_cost,
    }


def check_shapes(parts: Mapping[str, Any], facts: Mapping[str, Any], delta: Any, where: str) -> None:
    """Raise ValueError unless a record's tensors belong to its facts and to the delta ``[d_out, d_in]``."""
    columns = len(facts["requests"])
    out, into = (delta.shape[0], delta.shape[-1]) if len(delta.shape) == 2 else (None, None)
    for part, rows in (("keys", into), ("wanted", out), ("solved", into)):
        shape = tuple(parts[part].shape)
        if len(shape) != 2 or shape[1] != columns or rows not in (None, shape[0]):
            raise ValueError(f"{where}: {part} is {list(shape)}, expected {[rows, columns]}")
