"""Read the cases of a dataset by name, from a file, or both; with a check of its content.

A source is ``NAME[/VARIANT][:N]``, ``PATH[:N]`` or ``NAME[/VARIANT]@PATH[:N]``; N: only the first N cases. Files in
errata's own format (see :mod:`errata.data.requests`) are read in the same way, under the name ``cases``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from errata.data import fetching, formats
from errata.data._base import Dataset, Malformed, Record, Skip, no_facts
from errata.data.checking import Check, Tally
from errata.data.formats import Layout, Row, Truncated
from errata.data.requests import CASE_FIELDS, REQUIRED, read_cases
from errata.data.sets import REGISTRY
from errata.errors import DataError, RequestError
from errata.progress import OnProgress, ignore
from errata.registry import nearest, unknown
from errata.types import Case

OWN = "cases"
"""The name of errata's own format."""
YAML = (".yaml", ".yml")
SAMPLE = 20
"""Number of records read to recognise the dataset of a file."""
VARIANT_SAMPLE = 200
"""Number of records read to recognise the variant of a dataset."""


@dataclass(frozen=True)
class Source:
    """A parsed source."""

    dataset: str | None
    """None: to be recognised from the records."""
    variant: str
    """Empty: recognised from the file's records, else from its name, else the default."""
    path: Path | None
    """None: the file in the data folder."""
    limit: int | None = None


@dataclass(frozen=True)
class CheckedCases:
    """The cases of a source, and the check of them."""

    cases: list[Case]
    check: Check


def read(source: str | os.PathLike[str], *, limit: int | None = None, partial: bool = False) -> CheckedCases:
    """Read and check the cases of a source.

    Unusable rows are skipped and listed in the check. ``limit``: maximum number of cases. ``partial``: read a
    truncated file up to where it breaks off, which the check then reports. Raises DataError: no such file or
    dataset, records that fit no dataset or several, a file that differs from its lock, and, unless ``partial``,
    a truncated file. Raises RequestError for errors in files of errata's own format.
    """
    reading = _Reading(source, limit)
    cases = list(reading.cases(partial))
    return CheckedCases(cases, reading.check(cases))


def iterate(source: str | os.PathLike[str], *, limit: int | None = None) -> Iterator[Case]:
    """Yield the cases of a source one by one, for files larger than memory; raises as :func:`read` does."""
    return _Reading(source, limit).cases(False)


def check(source: str | os.PathLike[str], *, limit: int | None = None) -> Check:
    """Check a source, even if truncated; cases are held in memory only if the dataset's own counts need them."""
    reading = _Reading(source, limit)
    cases = [case for case in reading.cases(True) if reading.counts]
    return reading.check(cases)


def fetch(
    name: str, *, revision: str | None = None, endpoint: str | None = None, tick: OnProgress = ignore
) -> list[Path]:
    """Download a dataset, ``NAME[/VARIANT]``, with its lock, into the data folder; return the files.

    Without variant, the files of all variants. ``revision``: commit or branch on the Hub; default: the newest at
    the first download, then always that commit. ``endpoint``: another Hub. Raises DataError, see
    :func:`errata.data.fetching.fetch_file`.
    """
    head, slash, variant = name.partition("/")
    entry = dataset(head)
    variants = [_variant(entry, variant)] if slash else list(entry.variants)
    files = {fetching.file_name(entry, each): each for each in reversed(variants)}
    if not slash and len(files) > 1:  # files without a download address do not prevent the others
        files = {file: each for file, each in files.items() if fetching.origin(entry, each)} or files
    return [
        fetching.fetch_file(entry, each, revision=revision, endpoint=endpoint, tick=tick)
        for each in reversed(files.values())
    ]


def dataset(name: str) -> Dataset:
    """Return a dataset by name; ``-`` and ``_`` are equivalent. Raises DataError with the nearest names."""
    plain = name.replace("-", "_")
    if plain not in REGISTRY:
        raise DataError(unknown(name, [*REGISTRY, OWN], "dataset"))
    return REGISTRY.get(plain)


def parse(source: str | os.PathLike[str]) -> Source:
    """Parse a source. Raises DataError where it names neither a dataset nor a file.

    A dataset's name means that dataset; for a file of the same name write ``./NAME``.
    """
    text = os.fspath(source)
    if isinstance(source, os.PathLike) or (Path(text).is_file() and not _is_name(text)):
        return Source(None, "", Path(text))
    rest, limit = _split_limit(text)
    name, at, path = rest.partition("@")
    if at and _names_dataset(name):
        return _with_name(name, Path(path).expanduser(), limit)
    file = Path(rest).expanduser()
    if file.is_file() and not _is_name(rest):
        return Source(None, "", file, limit)
    if _names_dataset(rest):
        return _with_name(rest, None, limit)
    hint = nearest(name.partition("/")[0], [*REGISTRY, OWN])
    raise DataError(
        f"{text!r} names neither a file nor a dataset"
        + (f"; did you mean {hint!r}?" if hint else ".")
        + f" Expected PATH, NAME[/VARIANT] or NAME[/VARIANT]@PATH, with NAME one of {', '.join(REGISTRY)}"
    )


def _with_name(name: str, path: Path | None, limit: int | None) -> Source:
    head, _, variant = name.partition("/")
    if head == OWN and (path is None or variant):
        raise DataError(f"{OWN} means cases in your own file: write {OWN}@PATH, without variant")
    return Source(head, variant, path, limit)


def _names_dataset(text: str) -> bool:
    """Whether a text begins with the name of a dataset."""
    head = text.partition("/")[0].replace("-", "_")
    return head in REGISTRY or head == OWN


def _is_name(text: str) -> bool:
    """Whether a text is a dataset's name, and its variant, if any, exists."""
    head, slash, variant = text.partition("/")
    return _names_dataset(head) and (not slash or (head != OWN and variant in dataset(head).variants))


def _split_limit(text: str) -> tuple[str, int | None]:
    """Split ``:N`` off. Raises DataError for N below 1."""
    head, colon, count = text.rpartition(":")
    if not colon or not count.isdecimal():
        return text, None
    if int(count) < 1:
        raise DataError(f"{text!r}: expected a number from 1 after the colon, found {count}")
    return head, int(count)


def _variant(entry: Dataset, variant: str) -> str:
    """Return a variant, or the default for an empty one. Raises DataError with the nearest names."""
    if not variant:
        return entry.variants[0]
    if variant not in entry.variants:
        names = [v for v in entry.variants if v]
        raise DataError(unknown(variant, names, f"variant of {entry.name}"))
    return variant


class _Reading:
    """One pass over one source."""

    def __init__(self, source: str | os.PathLike[str], limit: int | None) -> None:
        source_parts = parse(source)
        limits = [n for n in (limit, source_parts.limit) if n is not None]
        if limits and min(limits) < 1:
            raise DataError(f"expected a limit from 1, found {min(limits)}")
        self.limit = min(limits, default=None)
        self.tally = Tally()
        self.omissions: Counter[str] = Counter()
        self.entry: Dataset | None = None
        self.variant = ""
        is_named = source_parts.dataset not in (None, OWN)
        if is_named:
            self.entry = dataset(str(source_parts.dataset))
            self.variant = _variant(self.entry, source_parts.variant)
            if source_parts.path and not source_parts.variant:
                self.variant = fetching.variant_of(
                    self.entry, source_parts.path, _first(self.entry, source_parts.path)
                )
            self.path = source_parts.path or fetching.locate(self.entry, self.variant)
        else:
            self.path = Path(source_parts.path or "")
        self.digest = fetching.verified_sha256(self.path)
        if source_parts.dataset is None:
            self.entry = _recognise(self.path)
            if self.entry:
                self.variant = fetching.variant_of(self.entry, self.path, _first(self.entry, self.path))

    @property
    def counts(self) -> bool:
        """Whether the dataset has counts of its own, which need the cases."""
        return self.entry is not None and self.entry.facts is not no_facts

    def cases(self, partial: bool) -> Iterator[Case]:
        """Yield and count cases; ``partial``: stop without an error where the file breaks off."""
        every = self._own() if self.entry is None else self._convert(self.entry)
        try:
            yield from islice(every, self.limit)
        except Truncated as error:
            self.tally.broken = str(error)
            if not partial:
                raise

    def _own(self) -> Iterator[Case]:
        for case in read_cases(self.path):
            self.tally.rows += 1
            yield self.tally.add(case)

    def _convert(self, entry: Dataset) -> Iterator[Case]:
        gate = entry.gate(self.variant) if entry.gate else None
        for index, row in enumerate(_rows(self.path, entry, self.variant)):
            self.tally.rows += 1
            if row.fault is not None:
                self.tally.leave_out(row.where, row.fault)
                continue
            record = Record(row.value, row.where, index, base=self.path.parent)
            try:
                for case in entry.cases(record, self.variant):
                    if gate is None or self._passes(gate, record, case):
                        self.omissions.update(record.omissions)
                        record.omissions.clear()
                        yield self.tally.add(case)
            except (Skip, RequestError) as error:
                self.tally.leave_out(row.where, error)

    def _passes(self, gate: Callable[[Record, Case], None], record: Record, case: Case) -> bool:
        try:
            gate(record, case)
        except Skip as error:
            self.tally.leave_out(record.where, error)
            return False
        return True

    def check(self, cases: list[Case]) -> Check:
        """Return the check of this pass; ``cases``: its cases, for the dataset's own counts."""
        limit_reached = self.limit is not None and self.tally.cases >= self.limit
        facts = dict(self.entry.facts(cases)) if self.entry and self.counts else {}
        if self.omissions:
            facts["left out of cases"] = dict(self.omissions)
        return Check(
            dataset=self.entry.name if self.entry else OWN,
            variant=self.variant,
            path=str(self.path),
            sha256=self.digest,
            limit=self.limit if limit_reached else None,
            facts=facts,
            **self.tally.counts(),
        )


def _rows(path: Path, entry: Dataset, variant: str) -> Iterator[Row]:
    """Read the records of a file in the format of its dataset."""
    if entry.read_file is not None:
        yield from _number(path, entry.read_file(path))
        return
    form = formats.layout(path)
    for row in formats.rows(path, form):
        if form == "document" and entry.records is not None and isinstance(row.value, Mapping):
            yield from _number(path, entry.records(row.value, variant))
        else:
            yield row


def _number(path: Path, values: Iterator[Any]) -> Iterator[Row]:
    """Number the records that a dataset module unpacks. Raises Truncated where it cannot continue."""
    number = 0
    try:
        for value in values:
            number += 1
            yield Row(f"record {number}", value)
    except (DataError, Skip) as error:
        raise Truncated(f"{path} cannot be read after record {number}: {error}") from error


def _recognise(path: Path) -> Dataset | None:
    """Recognise the dataset of a file from its records; None: errata's own cases.

    Raises DataError where none fits, or several do.
    """
    if path.suffix.lower() in YAML:
        return None
    matches = [entry for entry in map(REGISTRY.get, REGISTRY) if entry.fits_file and entry.fits_file(path)]
    if len(matches) == 1:
        return matches[0]
    form = formats.layout(path)
    if form == "other":
        own = [name for name in REGISTRY if REGISTRY.get(name).read_file is not None]
        raise DataError(
            f"{path} is of no known format: expected JSON, JSON lines, CSV, TSV or parquet; "
            f"name datasets in a format of their own, NAME@PATH: {', '.join(own) or 'none'}"
        )
    sample = _sample(path, form)
    if sample and all(isinstance(v, Mapping) and {*REQUIRED} <= v.keys() <= {*CASE_FIELDS} for v in sample):
        return None
    counts = {name: _count_fitting(REGISTRY.get(name), sample, form) for name in REGISTRY}
    names = _best({name: count for name, count in counts.items() if count}, sample, form)
    if len(names) == 1:
        return REGISTRY.get(names[0])
    if names:
        raise DataError(
            f"the records of {path} fit several datasets: {', '.join(names)}; say which, e.g. {names[0]}@{path}"
        )
    if sample and isinstance(sample[0], Mapping) and {*REQUIRED} <= sample[0].keys():
        return None  # errata's own format with an unknown field: its reader reports which
    raise DataError(
        f"the records of {path} fit no dataset: found {_shape(sample)}; known datasets are "
        f"{', '.join(REGISTRY)}; if it is one of them, name it, NAME@PATH"
    )


def _best(counts: Mapping[str, int], sample: list[Any], form: Layout) -> list[str]:
    """Return the datasets that fit most records; those that can read none of them are dropped if others can."""
    names = list(counts)
    if len(names) > 1:
        names = [name for name in names if _readable(REGISTRY.get(name), sample, form)] or names
    best = max((counts[name] for name in names), default=0)
    return [name for name in names if counts[name] == best]


def _readable(entry: Dataset, sample: list[Any], form: Layout) -> bool:
    """Whether any sampled record matches the dataset's schema, even if it is then skipped."""
    for index, value in enumerate(_unpack(entry, sample, form, SAMPLE)):
        try:
            for _ in entry.cases(Record(value, f"record {index + 1}", index), entry.variants[0]):
                return True
        except Malformed:
            continue
        except (Skip, RequestError):
            return True
    return False


def _first(entry: Dataset, path: Path) -> list[Any]:
    """Return the first records of a dataset's file, unpacked; empty where they cannot be read."""
    if entry.variants_of is None:
        return []
    try:
        if entry.read_file is not None:
            return list(islice(entry.read_file(path), VARIANT_SAMPLE))
        form = formats.layout(path)
        return _unpack(entry, _sample(path, form, VARIANT_SAMPLE), form, VARIANT_SAMPLE)
    except (DataError, Skip):
        return []  # the reading itself reports what is wrong


def _unpack(entry: Dataset, sample: list[Any], form: Layout, limit: int) -> list[Any]:
    """Return the records that a dataset module unpacks from a sample of a file."""
    if form == "document" and entry.records is not None and sample and isinstance(sample[0], Mapping):
        try:
            return list(islice(entry.records(sample[0], entry.variants[0]), limit))
        except Skip:  # a document of another shape
            return []
    return sample


def _sample(path: Path, form: Layout, limit: int = SAMPLE) -> list[Any]:
    """Read the first records, as far as they can be read."""
    values: list[Any] = []
    with closing(formats.rows(path, form)) as rows:
        try:
            for row in rows:
                if row.fault is None:
                    values.append(row.value)
                if len(values) == limit:
                    break
        except Truncated:
            if not values:
                raise  # nothing to tell the dataset by; else the reading itself reports the break
    return values


def _count_fitting(entry: Dataset, sample: list[Any], form: Layout) -> int:
    """Count the sampled records that have a dataset's fields."""
    count = sum(bool(entry.fits(value)) for value in sample)
    document = sample[0] if form == "document" and sample else None
    if entry.records is not None and isinstance(document, Mapping):
        try:
            count += sum(bool(entry.fits(v)) for v in islice(entry.records(document, entry.variants[0]), 1))
        except Skip:  # a document of another shape
            return count
    return count


def _shape(sample: list[Any]) -> str:
    """Describe the fields of the records, for an error."""
    if not sample:
        return "no records"
    first = sample[0]
    if isinstance(first, Mapping):
        fields = ", ".join(map(str, list(first)[:12]))
        return f"records with the fields {fields}{' ...' if len(first) > 12 else ''}"
    return f"records of type {type(first).__name__}"
