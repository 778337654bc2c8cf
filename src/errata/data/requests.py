"""Read requests and cases from files: JSONL, JSON, CSV, YAML. Every error is listed, with its line.

Requests in other tools' formats are read too, see :mod:`errata.data.foreign`. Cases of any dataset can be written to
a file for people to edit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any, get_args

from errata import files
from errata.data import documents, foreign, tables
from errata.data._base import Record
from errata.data.pictures import read_picture, write_picture
from errata.data.tables import Unreadable
from errata.errors import ErrataError, RequestError, brief, listing, shown
from errata.registry import nearest, unknown
from errata.types import IMAGE, Case, Form, Picture, Probe, Request, is_date, request_problems
from errata.types.picture import without_mark

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".yaml", ".yml")
TABLES, YAML = (".csv", ".tsv"), (".yaml", ".yml")
REQUIRED = ("prompt", "subject", "target")
REQUEST_FIELDS = (*REQUIRED, "target_old", "id", "language", "valid_from", "indirect", "image")
CASE_FIELDS = (*REQUEST_FIELDS, "case", "also", "efficacy", "probes")
PROBE_FIELDS = tuple(f.name for f in fields(Probe) if f.name != "more_images")
FORMS: tuple[str, ...] = get_args(Form)
NEEDS = ("any", "all")


def read_requests(path: str | Path) -> list[Request]:
    """Read requests. Raises RequestError listing every missing, unknown or malformed field by line.

    Records may be cases: the requests of ``also`` then follow the record's own, and probes are ignored. Records of
    other tools are read too, see :mod:`errata.data.foreign`.
    """
    requests_read, complaints = [], []
    records = _records(Path(path))
    reader = None if _own(records) else foreign.reader([record for _, record in records])
    if reader is None:
        _check_fields(path, records)
    for index, (where, record) in enumerate(records):
        requests, wrong = (
            _requests(where, record, Path(path).parent)
            if reader is None
            else _foreign(reader, where, record, index)
        )
        requests_read += requests
        complaints += wrong
    return _all_or_raise(path, requests_read, complaints)


def _own(records: Sequence[tuple[str, Any]]) -> bool:
    """Whether any record has the required fields of errata's format, or all but one of them."""
    field_counts = [
        sum(name in record for name in REQUIRED) for _, record in records if isinstance(record, Mapping)
    ]
    return len(REQUIRED) in field_counts or not field_counts


def _foreign(reader: foreign.Reader, where: str, record: Any, index: int) -> tuple[list[Request], list[str]]:
    """Return the requests of a record of another tool, and the errors in it."""
    why = str(record) if isinstance(record, Unreadable) else documents.fault(record)
    if why is not None:
        return [], [f"{where}: {why}"]
    try:
        return list(reader(Record(record, where, index))), []
    except ErrataError as error:
        return [], [f"{where}: {error}"]


def _check_fields(path: str | Path, records: Sequence[tuple[str, Any]]) -> None:
    """Raise a single RequestError where no record has the fields of a request, listing the fields found."""
    mappings = [record for _, record in records if isinstance(record, Mapping)]
    if len(mappings) < 2 or _own(records):
        return
    fields = list(dict.fromkeys(str(key) for record in mappings for key in record))
    hints = [f"{key} for {near}" for name in REQUIRED if name not in fields
             if (near := name) and (key := nearest(name, fields)) is not None]  # fmt: skip
    raise RequestError(
        f"{path}: {records[0][0]} and the {len(records) - 1:,} after it have not the fields of a request: found "
        f"{brief(', '.join(fields)) or 'none'}; expected {', '.join(REQUIRED)}, and optionally "
        f"{', '.join(name for name in CASE_FIELDS if name not in REQUIRED)}"
        + (f" (perhaps {', '.join(hints)})" if hints else "")
        + ". Files of EasyEdit, ROME, CounterFact and zsRE can be read directly; for other datasets, convert the "
        "file to cases with errata data export NAME@FILE"
    )


def read_cases(path: str | Path) -> list[Case]:
    """Read cases: requests, each with a list of ``probes``, whose fields are those of :class:`Probe`.

    Besides a request's fields a record may have ``also``, further requests of the case; ``case``, its id if that is
    not the request's; and ``efficacy``: false means that no efficacy probe is added (by default, a case without one
    gets one). Raises RequestError as above.
    """
    cases, complaints = [], []
    records = _records(Path(path))
    _check_fields(path, records)
    for i, (where, record) in enumerate(records, 1):
        case, wrong = _case(where, record, f"{Path(path).name}:{i}", Path(path).parent)
        complaints += wrong
        cases += [case] if case else []
    return _all_or_raise(path, cases, complaints)


def write_cases(path: str | Path, cases: Iterable[Case]) -> int:
    """Write cases as JSON lines that :func:`read_cases` reads back as equal cases; return their number.

    The file appears only when it is complete; pictures are written into a folder beside it.
    Raises RequestError where its name does not end in ``.jsonl`` or it
    cannot be written, if there are no cases, and for a case that would be read back differently.
    """
    check_target(path)
    count = 0
    with files.replacing(path, RequestError) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        for case in cases:
            file.write(_line(case, Path(path)) + "\n")
            count += 1
        if not count:
            raise RequestError(f"there are no cases to write to {path}")
    return count


def check_target(path: str | Path) -> None:
    """Raise RequestError where :func:`write_cases` would refuse a file name, before any cases are read."""
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise RequestError(f"cases are written as JSON lines: expected a name FILE.jsonl, found {path}")
    if not path.parent.is_dir():
        raise RequestError(f"cannot write {path}: there is no folder {path.parent}")
    files.output(path, RequestError)


def _line(case: Case, path: Path) -> str:
    """Encode a case as one line of JSON, for a file beside which its pictures are written.

    Raises RequestError where decoding it would give another case.
    """
    record: dict[str, Any] = _written(case.request.to_dict(), case.request.pictures, path)
    if case.id != case.request.id:
        record["case"] = case.id
    if case.also:
        record["also"] = [_written(request.to_dict(), request.pictures, path) for request in case.also]
    if not _asks_efficacy(case.probes):
        record["efficacy"] = False
    record["probes"] = [_written(_plain(probe), probe.pictures, path) for probe in case.probes]
    line = json.dumps(record, ensure_ascii=False)
    back, wrong = _case("as a record", json.loads(line), "unnamed", path.parent)
    if back != case:
        differing = [f.name for f in fields(Case) if back and getattr(back, f.name) != getattr(case, f.name)]
        raise RequestError(
            f"case {shown(case.id)} cannot be written so that it is read back unchanged: "
            + ("; ".join(wrong) or f"{', '.join(differing)} would change, as empty fields count as absent")
        )
    return line


def _written(record: dict[str, Any], pictures: Sequence[Picture], path: Path) -> dict[str, Any]:
    """Return a record whose pictures, if it has any, are files in the folder beside a file of cases."""
    if not pictures:
        return record
    folder = path.with_name(f"{path.stem}-pictures")
    names = [f"{folder.name}/{write_picture(picture, folder)}" for picture in pictures]
    return {**record, "image": names if len(names) > 1 else names[0]}


def _plain(probe: Probe) -> dict[str, Any]:
    """Return the fields of a probe that differ from their defaults."""
    values = {f.name: getattr(probe, f.name) for f in fields(Probe) if getattr(probe, f.name) != f.default}
    values["prompt"] = without_mark(probe.prompt, probe.image, probe.more_images)
    values.pop("more_images", None)  # image is then a list of all
    if probe.covariates:
        values["covariates"] = dict(probe.covariates)
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != ()
    }


def _all_or_raise(path: str | Path, items: list, complaints: list[str]) -> list:
    if complaints:
        raise RequestError(
            f"{path}: {len(complaints):,} problem{'s' * (len(complaints) > 1)}\n"
            + listing(_group(complaints))
        )
    if not items:
        raise RequestError(f"{path} holds no requests")
    return items


def _group(complaints: Sequence[str]) -> list[str]:
    """Merge an error of more than three records into one line that names the first record."""
    places: dict[str, list[str]] = {}
    for complaint in complaints:
        where, _, what = complaint.partition(": ")
        places.setdefault(what, []).append(where)
    lines: list[str] = []
    for what, where in places.items():
        few = len(where) <= 3
        lines += [f"{place}: {what}" for place in where] if few else [
            f"{where[0]} and {len(where) - 1:,} more: {what}"
        ]  # fmt: skip
    return lines


def _case(where: str, record: Any, name: str, base: Path) -> tuple[Case | None, list[str]]:
    """Read one case; ``name``: its id if the record has none; ``base``: the folder that its pictures are named from."""
    requests, wrong = _requests(where, record, base)
    if not isinstance(record, Mapping):
        return None, wrong
    probes = _probes(where, record, wrong, base)
    own, efficacy = record.get("case"), record.get("efficacy")
    if not _absent(own) and not _is_text(own):
        wrong.append(f"{where}: case must be text, found {type(own).__name__} {shown(own, 60)}")
    if not _absent(efficacy) and not isinstance(efficacy, bool):
        wrong.append(f"{where}: efficacy must be true or false, found {shown(efficacy, 60)}")
    if wrong:
        return None, wrong
    first, *others = requests
    if efficacy is not False and not _asks_efficacy(probes):
        before = _old_answers(record.get("target_old"))
        own_probe = Probe(
            "efficacy",
            first.text,
            (first.target,),
            before,
            first.target_old,
            image=first.image,
            more_images=first.more_images,
        )
        probes.insert(0, own_probe)
    return Case(own or first.id or name, first, tuple(probes), tuple(others)), []


def _asks_efficacy(probes: Iterable[Probe]) -> bool:
    return any(probe.kind == "efficacy" for probe in probes)


def _requests(where: str, record: Any, base: Path) -> tuple[list[Request], list[str]]:
    """Read all requests of a record; none if any of them has errors."""
    first, wrong = _request(where, record, CASE_FIELDS, base)
    requests = [first]
    for i, other in enumerate(_list_field(where, record, "also", wrong), 1):
        further, more = _request(f"{where}, also {i}", other, REQUEST_FIELDS, base)
        requests.append(further)
        wrong += more
    return ([] if wrong else [request for request in requests if request]), wrong


def _list_field(where: str, record: Any, name: str, wrong: list[str]) -> list[Any]:
    """Return a field that must be a list, if present; an error is added to ``wrong``."""
    value = record.get(name) if isinstance(record, Mapping) else None
    if _absent(value):
        return []
    if not isinstance(value, list):
        wrong.append(f"{where}: {name} must be a list, found {type(value).__name__}")
        return []
    return value


def _request(where: str, record: Any, fields: Sequence[str], base: Path) -> tuple[Request | None, list[str]]:
    if isinstance(record, Unreadable):
        return None, [f"{where}: {record}"]
    if not isinstance(record, Mapping):
        return None, [f"{where}: expected a record of fields, found {type(record).__name__}"]
    why = documents.fault(record)
    if why is not None:
        return None, [f"{where}: {why}"]
    record = {
        key: value
        for key, value in record.items()
        if key in REQUIRED or not (value in (None, "") or (key in ("target_old", "image") and value == []))
    }
    wrong = [f"{where}: {_unknown(key, fields)}" for key in record if key not in fields]
    missing = [name for name in REQUIRED if name not in record]
    if missing:
        return None, [*wrong, f"{where}: missing {', '.join(missing)}"]
    values = {key: record[key] for key in REQUEST_FIELDS if key in record}
    prompt, subject, target = (values[name] for name in REQUIRED)
    if "image" in values:
        amiss: list[str] = []
        pictures = _pictures(values["image"], base, amiss)
        values |= {"image": next(iter(pictures), None), "more_images": pictures[1:]}
        wrong += [f"{where}: {what}" for what in amiss]
        if subject == IMAGE and isinstance(prompt, str) and IMAGE not in prompt:
            prompt = f"{IMAGE}{prompt}"
    several = bool(values.get("more_images"))
    problems = _placing(values) if several else request_problems(prompt, subject, target)
    wrong += [f"{where}: {p}" for p in problems]
    if "target_old" in values:
        answers = _old_answers(values["target_old"])
        if not answers:
            wrong.append(
                f"{where}: target_old must be text, or a list of texts, found {_describe(values['target_old'])}"
            )
        values["target_old"] = answers[0] if answers else None
    if "id" in values:
        own = values["id"]
        if not _is_text(own) and type(own) is not int:
            wrong.append(f"{where}: id must be text or a whole number, found {_describe(own)}")
        values["id"] = str(own) if type(own) is int else own
    if "language" in values and not _is_text(values["language"]):
        wrong.append(f"{where}: language must be text, found {_describe(values['language'])}")
    if "valid_from" in values:
        own = values["valid_from"]
        values["valid_from"] = str(own) if type(own) is int or isinstance(own, date) else own
        if not is_date(values["valid_from"]):
            wrong.append(
                f"{where}: valid_from must be a date as 2019, 2019-05 or 2019-05-31, found {_describe(own)}"
            )
    if "indirect" in values:
        values["indirect"] = _texts(values["indirect"], "indirect", wrong_texts := list[str]())
        wrong += [f"{where}: {what}" for what in wrong_texts]
    return (None, wrong) if wrong else (Request(**values), [])


def _placing(values: Mapping[str, Any]) -> list[str]:
    """List what is wrong with a request about several pictures; its subject may be one of them."""
    named = {name: values[name] for name in (*REQUIRED, "image", "more_images")}
    if not all(isinstance(values[name], str) for name in REQUIRED):
        return request_problems(*(values[name] for name in REQUIRED))
    try:
        Request(**named)
    except RequestError as error:
        return [str(error)]
    return []


def _pictures(value: Any, base: Path, amiss: list[str]) -> tuple[Picture, ...]:
    """Read the pictures that a path, or a list of them, names, relative to the folder ``base``.

    Errors are added to ``amiss``.
    """
    pictures = []
    for path in value if isinstance(value, list) else [value]:
        if not _is_text(path):
            amiss.append(f"image must be the path of an image file, found {_describe(path)}")
            continue
        try:
            pictures.append(read_picture(path, base=base))
        except RequestError as error:
            amiss.append(f"image: {error}")
    return tuple(pictures)


def _old_answers(value: Any) -> tuple[str, ...]:
    """Return the spellings of the old answer, canonical one first; empty where it is not text or a list of texts."""
    answers = [value] if isinstance(value, str) else value
    if not isinstance(answers, list) or not all(map(_is_text, answers)):
        return ()
    return tuple(dict.fromkeys(answers))


def _describe(value: Any) -> str:
    return f"{type(value).__name__} {shown(value, 60)}"


def _unknown(key: Any, fields: Sequence[str]) -> str:
    hint = nearest(str(key)[:100], list(fields))
    return f"unknown field {shown(key)}" + (f", did you mean {hint!r}?" if hint else "")


def _probes(where: str, record: Mapping[str, Any], wrong: list[str], base: Path) -> list[Probe]:
    """Read a record's probes; errors are added to ``wrong``."""
    probes = []
    for i, value in enumerate(_list_field(where, record, "probes", wrong), 1):
        place = f"{where}, probe {i}"
        if isinstance(value, Mapping):
            probe, amiss = _probe(value, base)
            wrong += [f"{place}: {what}" for what in amiss]
            probes += [probe] if probe else []
        else:
            wrong.append(f"{place}: expected a record, found {type(value).__name__}")
    return probes


def _probe(value: Mapping[str, Any], base: Path) -> tuple[Probe | None, list[str]]:
    amiss = [_unknown(key, PROBE_FIELDS) for key in value if key not in PROBE_FIELDS]
    form, need = _word(value, "form", FORMS, amiss), _word(value, "need", NEEDS, amiss)
    required = ("kind", "prompt") if form == "open" else ("kind", "prompt", "answers")
    missing = [name for name in required if _absent(value.get(name))]
    if missing:
        return None, [*amiss, f"missing {', '.join(missing)}"]
    amiss += [
        f"{name} must be text, found {_describe(value[name])}"
        for name in ("kind", "prompt", "rival", "group", "language")
        if not _absent(value.get(name)) and not _is_text(value[name])
    ]
    answers, before, choices, steps = (
        _texts(value.get(name), name, amiss) for name in ("answers", "before", "choices", "steps")
    )
    if (form == "steps") != bool(steps):
        amiss.append(
            f"form 'steps' and its steps belong together, found form {form!r} and {len(steps)} steps"
        )
    if form == "choice" and not choices:
        amiss.append("missing choices, the labels that form 'choice' chooses from")
    elif form == "choice" and answers and answers[0] not in choices:
        amiss.append(
            f"the first answer {shown(answers[0])} is not among the choices {brief(', '.join(choices))}"
        )
    elif form != "choice" and choices:
        amiss.append(f"choices belong to form 'choice', found form {form!r}")
    rival, group, language = (value.get(name) or None for name in ("rival", "group", "language"))
    if need == "all" and group is None:
        amiss.append("need 'all' applies to a group of probes: name the group, or omit need")
    covariates = _numbers(value.get("covariates"), amiss)
    pictures = () if _absent(value.get("image")) else _pictures(value["image"], base, amiss)
    if amiss:
        return None, amiss
    try:
        probe = Probe(
            value["kind"], value["prompt"], answers, before, rival, form, group, need, choices, covariates, language,
            steps, next(iter(pictures), None), pictures[1:],
        )  # fmt: skip
    except RequestError as error:
        return None, [str(error)]
    return probe, []


def _numbers(value: Any, amiss: list[str]) -> tuple[tuple[str, float], ...]:
    """Read covariates, numbers by name; errors are added to ``amiss``."""
    if _absent(value) or value == {}:
        return ()
    if not isinstance(value, Mapping) or not all(type(number) in (int, float) for number in value.values()):
        amiss.append(f"covariates must be numbers by name, found {_describe(value)}")
        return ()
    return tuple((str(name), float(number)) for name, number in value.items())


def _word(value: Mapping[str, Any], name: str, choices: Sequence[str], amiss: list[str]) -> Any:
    """Read a field that must be one of ``choices``, the first where it is absent; errors are added to ``amiss``."""
    word = value.get(name)
    if _absent(word):
        return choices[0]
    if word not in choices:
        amiss.append(unknown(brief(str(word)) if isinstance(word, str) else shown(word), list(choices), name))
    return word


def _absent(value: Any) -> bool:
    """Whether a field is missing, or empty as in a table's cell."""
    return value is None or value == "" or value == []


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any, name: str, amiss: list[str]) -> tuple[str, ...]:
    """Read a text or whole number, or a list of them, as texts; errors are added to ``amiss``."""
    if _absent(value):
        return ()
    items = value if isinstance(value, (list, tuple)) else [value]
    wrong = [one for one in items if not _is_text(one) and type(one) is not int]
    amiss += [f"{name} must be texts that are not empty, found {_describe(one)}" for one in wrong]
    return () if wrong else tuple(str(one) for one in items)


def _records(path: Path) -> list[tuple[str, Any]]:
    """Read a file's records with their positions. Raises RequestError where its format is unknown."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise RequestError(
            f"{path}: unknown kind of file {brief(suffix, 40)!r}, expected one of {', '.join(SUFFIXES)}"
        )

    def fail(reason: str) -> RequestError:
        return RequestError(f"{path}: {reason}")

    text = files.read_text(path, RequestError)
    with files.reader(fail):
        if suffix in TABLES:
            return list(tables.records(text, (*CASE_FIELDS, *foreign.FIELDS), fail, _is_row))
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        return documents.yaml_records(text, fail) if suffix in YAML else documents.json_records(text, fail)


def _is_row(cells: Mapping[str, str]) -> bool:
    """Whether the cells of a row form a complete request."""
    prompt, subject = cells.get("prompt", ""), cells.get("subject", "").strip()
    return bool(subject) and ("{}" in prompt or subject in prompt)
