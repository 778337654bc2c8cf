"""Read requests and cases from files: JSONL, JSON, CSV, YAML. Every mistake is listed, with its line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from errata.errors import RequestError
from errata.registry import nearest
from errata.types import Case, Probe, Request, request_problems

SUFFIXES = (".jsonl", ".json", ".csv", ".yaml", ".yml")
NEEDED = ("prompt", "subject", "target")
REQUEST_FIELDS = (*NEEDED, "target_old", "id")
PROBE_FIELDS = ("kind", "prompt", "answers", "before", "rival")


def read_requests(path: str | Path) -> list[Request]:
    """Read requests. Raises RequestError listing every missing, unknown or malformed field by line.

    Records may carry ``probes``, as case files do; they are left aside.
    """
    found, complaints = [], []
    for where, record in _records(Path(path)):
        request, wrong = _request(where, record)
        complaints += wrong
        if request:
            found.append(request)
    return _all_or_raise(path, found, complaints)


def read_cases(path: str | Path) -> list[Case]:
    """Read cases: requests, each with a list of ``probes`` (kind, prompt, answers, before, rival).

    A request without probes gets one: whether it took effect. Raises RequestError as above.
    """
    found, complaints = [], []
    for i, (where, record) in enumerate(_records(Path(path))):
        request, wrong = _request(where, record)
        probes, more = _probes(where, record) if isinstance(record, Mapping) else ([], [])
        complaints += wrong + more
        if request and not more:
            efficacy = Probe(
                "efficacy",
                request.text,
                (request.target,),
                (request.target_old,) if request.target_old else (),
                request.target_old,
            )
            if not any(p.kind == "efficacy" for p in probes):
                probes.insert(0, efficacy)
            found.append(Case(request.id or f"{Path(path).name}:{i + 1}", request, tuple(probes)))
    return _all_or_raise(path, found, complaints)


def _all_or_raise(path: str | Path, found: list, complaints: list[str]) -> list:
    if complaints:
        raise RequestError(f"{path}: {len(complaints)} problems\n" + "\n".join(complaints))
    if not found:
        raise RequestError(f"{path} holds no requests")
    return found


def _request(where: str, record: Any) -> tuple[Request | None, list[str]]:
    if isinstance(record, _Broken):
        return None, [f"{where}: {record}"]
    if not isinstance(record, Mapping):
        return None, [f"{where}: expected a record of fields, found {type(record).__name__}"]
    record = {key: value for key, value in record.items() if value not in (None, "") or key in NEEDED}
    wrong = [f"{where}: {_unknown(key)}" for key in record if key not in (*REQUEST_FIELDS, "probes")]
    missing = [name for name in NEEDED if name not in record]
    if missing:
        return None, [*wrong, f"{where}: missing {', '.join(missing)}"]
    values = {key: record[key] for key in REQUEST_FIELDS if key in record}
    wrong += [f"{where}: {p}" for p in request_problems(*(values[name] for name in NEEDED))]
    for name in ("target_old", "id"):
        if name in values and not isinstance(values[name], str):
            values[name] = str(values[name])
    return (None, wrong) if wrong else (Request(**values), [])


def _unknown(key: Any) -> str:
    hint = nearest(str(key), [*REQUEST_FIELDS, "probes"])
    return f"unknown field {key!r}" + (f", did you mean {hint!r}?" if hint else "")


def _probes(where: str, record: Mapping[str, Any]) -> tuple[list[Probe], list[str]]:
    listed = record.get("probes") or []
    if not isinstance(listed, list):
        return [], [f"{where}: probes must be a list, found {type(listed).__name__}"]
    found, wrong = [], []
    for i, probe in enumerate(listed):
        place = f"{where}, probe {i + 1}"
        if not isinstance(probe, Mapping):
            wrong.append(f"{place}: expected a record, found {type(probe).__name__}")
            continue
        wrong += [f"{place}: unknown field {key!r}" for key in probe if key not in PROBE_FIELDS]
        missing = [name for name in ("kind", "prompt", "answers") if not probe.get(name)]
        if missing:
            wrong.append(f"{place}: missing {', '.join(missing)}")
            continue
        amiss = [
            f"{place}: {name} must be text, found {type(probe[name]).__name__} {probe[name]!r:.60}"
            for name in ("kind", "prompt", "rival")
            if probe.get(name) not in (None, "") and not _is_text(probe[name])
        ]
        answers, before = (
            _texts(probe.get(name), f"{place}: {name}", amiss) for name in ("answers", "before")
        )
        wrong += amiss
        if not amiss:
            found.append(Probe(probe["kind"], probe["prompt"], answers, before, probe.get("rival") or None))
    return found, wrong


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any, place: str, amiss: list[str]) -> tuple[str, ...]:
    """Read a text or number, or a list of them, as texts; what is neither is added to ``amiss``."""
    if value in (None, ""):
        return ()
    listed = value if isinstance(value, (list, tuple)) else [value]
    numbers = (int, float)
    for one in listed:
        if not _is_text(one) and (not isinstance(one, numbers) or isinstance(one, bool)):
            amiss.append(f"{place} must be texts that are not empty, found {type(one).__name__} {one!r:.60}")
    return tuple(str(one) for one in listed)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (line or record number, record)."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise RequestError(f"{path}: unknown kind of file {suffix!r}, expected one of {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text: {error}") from error
    if suffix == ".jsonl":
        yield from _jsonl(text)
    elif suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        for record in reader:
            extra = record.pop(None, None)  # type: ignore[call-overload]
            yield f"line {reader.line_num}", {**record, **({"<surplus column>": extra} if extra else {})}
    else:
        yield from _document(path, text, suffix)


def _jsonl(text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines also cuts at U+2028, legal within JSON
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                yield f"line {number}", _Broken(f"not JSON: {error.msg} at column {error.colno}")


class _Broken(str):
    """A line that could not be read; reported like any record of the wrong type."""


def _document(path: Path, text: str, suffix: str) -> Iterator[tuple[str, Any]]:
    try:
        loaded = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        first = text[: error.pos]
        if error.msg == "Extra data" and first.endswith("\n") and "\n" not in first.strip():  # JSON lines
            yield from _jsonl(text)
            return
        raise RequestError(f"{path}: not JSON: {error.msg} at line {error.lineno}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RequestError(f"{path}: not YAML" + (f" at line {mark.line + 1}" if mark else "")) from error
    records = loaded if isinstance(loaded, list) else [loaded]
    lines = _starts(text) if suffix != ".json" else {}
    for i, record in enumerate(records):
        place = f"record {i + 1}" + (f" (line {lines[i]})" if i in lines else "")
        yield place, record


def _starts(text: str) -> dict[int, int]:
    """Line on which each item of a YAML list begins."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return {i: item.start_mark.line + 1 for i, item in enumerate(items) if item is not None}
