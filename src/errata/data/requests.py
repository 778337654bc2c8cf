"""Read requests and cases from files: JSONL, JSON, CSV, YAML. Every mistake is listed, with its line.

Cases can be written too: any dataset becomes a file that a person can change.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import yaml

from errata.errors import RequestError
from errata.registry import nearest, unknown
from errata.types import Case, Form, Probe, Request, request_problems

SUFFIXES = (".jsonl", ".json", ".csv", ".yaml", ".yml")
NEEDED = ("prompt", "subject", "target")
REQUEST_FIELDS = (*NEEDED, "target_old", "id")
CASE_FIELDS = (*REQUEST_FIELDS, "case", "also", "efficacy", "probes")
PROBE_FIELDS = tuple(f.name for f in fields(Probe))
FORMS: tuple[str, ...] = get_args(Form)
NEEDS = ("any", "all")


def read_requests(path: str | Path) -> list[Request]:
    """Read requests. Raises RequestError listing every missing, unknown or malformed field by line.

    Records may be cases: the requests of ``also`` then follow the record's own, what asks is left aside.
    """
    found, complaints = [], []
    for where, record in _records(Path(path)):
        requests, wrong = _requests(where, record)
        found += requests
        complaints += wrong
    return _all_or_raise(path, found, complaints)


def read_cases(path: str | Path) -> list[Case]:
    """Read cases: requests, each with a list of ``probes``, whose fields are those of :class:`Probe`.

    Besides a request's fields a record may have ``also``, further requests of the case; ``case``, its name
    where that is not the request's id; and ``efficacy``: false leaves out the probe whether the request took
    effect, which a case without one gets otherwise. Raises RequestError as above.
    """
    found, complaints = [], []
    for i, (where, record) in enumerate(_records(Path(path)), 1):
        case, wrong = _case(where, record, f"{Path(path).name}:{i}")
        complaints += wrong
        found += [case] if case else []
    return _all_or_raise(path, found, complaints)


def write_cases(path: str | Path, cases: Iterable[Case]) -> int:
    """Write cases as JSON lines that :func:`read_cases` reads back equal; return how many there were.

    The file appears once it is complete. Raises RequestError where its name does not end in ``.jsonl`` or it
    cannot be written, for no cases at all, and for a case that would not be read back as it is.
    """
    check_target(path)
    path = Path(path)
    made = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with made.open("w", encoding="utf-8", newline="\n") as file:
            for case in cases:
                file.write(_line(case) + "\n")
                count += 1
        if not count:
            raise RequestError(f"there are no cases to write to {path}")
        made.replace(path)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        made.unlink(missing_ok=True)
    return count


def check_target(path: str | Path) -> None:
    """Raise RequestError now where :func:`write_cases` would refuse a name after the cases are read."""
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise RequestError(f"cases are written as JSON lines: expected a name FILE.jsonl, found {path}")
    if path.is_dir():
        raise RequestError(f"cannot write {path}: it is a folder; name a file")
    if not path.parent.is_dir():
        raise RequestError(f"cannot write {path}: there is no folder {path.parent}")


def _line(case: Case) -> str:
    """Word a case as one line of JSON. Raises RequestError where the line says something else."""
    record: dict[str, Any] = case.request.to_dict()
    if case.id != case.request.id:
        record["case"] = case.id
    if case.also:
        record["also"] = [request.to_dict() for request in case.also]
    if not _asks_efficacy(case.probes):
        record["efficacy"] = False
    record["probes"] = [_plain(probe) for probe in case.probes]
    line = json.dumps(record, ensure_ascii=False)
    if any("\ud800" <= letter <= "\udfff" for letter in line):
        line = json.dumps(record)  # half a pair of surrogates is no UTF-8, but can be had as an escape
    back, wrong = _case("as a record", json.loads(line), "unnamed")
    if back != case:
        differing = [f.name for f in fields(Case) if back and getattr(back, f.name) != getattr(case, f.name)]
        raise RequestError(
            f"case {case.id!r} cannot be written so that it is read back as it is: "
            + ("; ".join(wrong) or f"{', '.join(differing)} would change, as empty fields count as absent")
        )
    return line


def _plain(probe: Probe) -> dict[str, Any]:
    """Return the fields of a probe that say something."""
    values = {f.name: getattr(probe, f.name) for f in fields(Probe) if getattr(probe, f.name) != f.default}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != ()
    }


def _all_or_raise(path: str | Path, found: list, complaints: list[str]) -> list:
    if complaints:
        raise RequestError(f"{path}: {len(complaints)} problems\n" + "\n".join(complaints))
    if not found:
        raise RequestError(f"{path} holds no requests")
    return found


def _case(where: str, record: Any, name: str) -> tuple[Case | None, list[str]]:
    """Read one case; ``name``: what it is called if the record does not say."""
    requests, wrong = _requests(where, record)
    if not isinstance(record, Mapping):
        return None, wrong
    probes = _probes(where, record, wrong)
    own, asked = record.get("case"), record.get("efficacy")
    if not _absent(own) and not _is_text(own):
        wrong.append(f"{where}: case must be text, found {type(own).__name__} {own!r:.60}")
    if not _absent(asked) and not isinstance(asked, bool):
        wrong.append(f"{where}: efficacy must be true or false, found {asked!r:.60}")
    if wrong:
        return None, wrong
    first, *others = requests
    if asked is not False and not _asks_efficacy(probes):
        before = (first.target_old,) if first.target_old else ()
        probes.insert(0, Probe("efficacy", first.text, (first.target,), before, first.target_old))
    return Case(own or first.id or name, first, tuple(probes), tuple(others)), []


def _asks_efficacy(probes: Iterable[Probe]) -> bool:
    return any(probe.kind == "efficacy" for probe in probes)


def _requests(where: str, record: Any) -> tuple[list[Request], list[str]]:
    """Read a record's request and those that must be in place with it; none where anything is wrong."""
    first, wrong = _request(where, record, CASE_FIELDS)
    found = [first]
    for i, other in enumerate(_listed(where, record, "also", wrong), 1):
        made, more = _request(f"{where}, also {i}", other, REQUEST_FIELDS)
        found.append(made)
        wrong += more
    return ([] if wrong else [request for request in found if request]), wrong


def _listed(where: str, record: Any, name: str, wrong: list[str]) -> list[Any]:
    """Return a field that is a list, if it is there; anything else is added to ``wrong``."""
    value = record.get(name) if isinstance(record, Mapping) else None
    if _absent(value):
        return []
    if not isinstance(value, list):
        wrong.append(f"{where}: {name} must be a list, found {type(value).__name__}")
        return []
    return value


def _request(where: str, record: Any, known: Sequence[str]) -> tuple[Request | None, list[str]]:
    if isinstance(record, _Broken):
        return None, [f"{where}: {record}"]
    if not isinstance(record, Mapping):
        return None, [f"{where}: expected a record of fields, found {type(record).__name__}"]
    record = {key: value for key, value in record.items() if value not in (None, "") or key in NEEDED}
    wrong = [f"{where}: {_unknown(key, known)}" for key in record if key not in known]
    missing = [name for name in NEEDED if name not in record]
    if missing:
        return None, [*wrong, f"{where}: missing {', '.join(missing)}"]
    values = {key: record[key] for key in REQUEST_FIELDS if key in record}
    wrong += [f"{where}: {p}" for p in request_problems(*(values[name] for name in NEEDED))]
    for name in ("target_old", "id"):
        if name in values and not isinstance(values[name], str):
            values[name] = str(values[name])
    return (None, wrong) if wrong else (Request(**values), [])


def _unknown(key: Any, known: Sequence[str]) -> str:
    hint = nearest(str(key), list(known))
    return f"unknown field {key!r}" + (f", did you mean {hint!r}?" if hint else "")


def _probes(where: str, record: Mapping[str, Any], wrong: list[str]) -> list[Probe]:
    """Read a record's probes; what is amiss is added to ``wrong``."""
    found = []
    for i, value in enumerate(_listed(where, record, "probes", wrong), 1):
        place = f"{where}, probe {i}"
        if isinstance(value, Mapping):
            probe, amiss = _probe(value)
            wrong += [f"{place}: {what}" for what in amiss]
            found += [probe] if probe else []
        else:
            wrong.append(f"{place}: expected a record, found {type(value).__name__}")
    return found


def _probe(value: Mapping[str, Any]) -> tuple[Probe | None, list[str]]:
    amiss = [_unknown(key, PROBE_FIELDS) for key in value if key not in PROBE_FIELDS]
    form, need = _word(value, "form", FORMS, amiss), _word(value, "need", NEEDS, amiss)
    needed = ("kind", "prompt") if form == "open" else ("kind", "prompt", "answers")
    missing = [name for name in needed if _absent(value.get(name))]
    if missing:
        return None, [*amiss, f"missing {', '.join(missing)}"]
    amiss += [
        f"{name} must be text, found {type(value[name]).__name__} {value[name]!r:.60}"
        for name in ("kind", "prompt", "rival", "group")
        if not _absent(value.get(name)) and not _is_text(value[name])
    ]
    answers, before, choices = (
        _texts(value.get(name), name, amiss) for name in ("answers", "before", "choices")
    )
    if form == "choice" and not choices:
        amiss.append("missing choices, the labels that form 'choice' chooses from")
    elif form == "choice" and answers[0] not in choices:
        amiss.append(f"the first answer {answers[0]!r} is not among the choices {', '.join(choices)}")
    elif form != "choice" and choices:
        amiss.append(f"choices belong to form 'choice', found form {form!r}")
    rival, group = (value.get(name) or None for name in ("rival", "group"))
    if need == "all" and group is None:
        amiss.append("need 'all' says how many of a group count: name the group, or leave need out")
    if amiss:
        return None, amiss
    return Probe(value["kind"], value["prompt"], answers, before, rival, form, group, need, choices), []


def _word(value: Mapping[str, Any], name: str, allowed: Sequence[str], amiss: list[str]) -> Any:
    """Read one of some words, the first where the field is absent; another one is added to ``amiss``."""
    word = value.get(name)
    if _absent(word):
        return allowed[0]
    if word not in allowed:
        amiss.append(unknown(str(word), list(allowed), name))
    return word


def _absent(value: Any) -> bool:
    """Whether a field says nothing: not there, or empty as in a table's cell."""
    return value is None or value == "" or value == []


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any, name: str, amiss: list[str]) -> tuple[str, ...]:
    """Read a text or number, or a list of them, as texts; what is neither is added to ``amiss``."""
    if _absent(value):
        return ()
    listed = value if isinstance(value, (list, tuple)) else [value]
    numbers = (int, float)
    for one in listed:
        if not _is_text(one) and (not isinstance(one, numbers) or isinstance(one, bool)):
            amiss.append(f"{name} must be texts that are not empty, found {type(one).__name__} {one!r:.60}")
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
