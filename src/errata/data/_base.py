"""What a dataset module declares, and how it reads the fields of a record."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errata.errors import ErrataError, shown
from errata.types import Case, Request, request_problems, subject_forms


class Skip(ErrataError):
    """A record is skipped, with the reason; raised by dataset modules, listed by the check."""


class Malformed(Skip):
    """A record does not match the dataset's schema; listed with its position."""


class SubjectAbsent(Skip):
    """A request's subject does not occur in its prompt; counted by the check on its own."""


@dataclass(frozen=True)
class Record:
    """One record of a file: its fields and its position. Reading a field of the wrong type raises Malformed."""

    value: Any
    where: str
    """Position for messages: ``record 17`` or ``line 3``, counted from 1."""
    index: int
    """The same, counted from 0, for ids of cases."""
    omissions: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    """Parts of a usable record that no case includes, counted by reason; shared by its nested records."""
    base: Path | None = field(default=None, compare=False)
    """Folder of the file, from which pictures are named; None where it is not known."""

    def get(self, path: str, default: Any = None) -> Any:
        """Return a field by dotted path, or the default where any part is absent."""
        value = self.value
        for part in path.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return default
            value = value[part]
        return value

    def text(self, path: str) -> str:
        """Return a field that must be a non-empty text. Raises Malformed."""
        value = self.get(path)
        if not isinstance(value, str) or not value.strip():
            raise Malformed(f"{path}: expected a text, found {_description(value)}")
        return value

    def texts(self, path: str, *, required: bool = False) -> tuple[str, ...]:
        """Return a field that is a text or a list of texts, without empty ones. Raises Malformed."""
        value = self.get(path)
        items = [value] if isinstance(value, str) else value
        if items is None and not required:
            return ()
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise Malformed(f"{path}: expected texts, found {_description(value)}")
        texts = tuple(item for item in items if item.strip())
        if required and not texts:
            raise Malformed(f"{path}: expected at least one text, found none")
        return texts

    def records(self, path: str, *, required: bool = False) -> list[Record]:
        """Return a field that is a list of records. Raises Malformed."""
        value = self.get(path)
        if value is None and not required:
            return []
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise Malformed(f"{path}: expected a list of records, found {_description(value)}")
        return [
            Record(item, f"{self.where}, {path} {i + 1}", i, self.omissions, self.base)
            for i, item in enumerate(value)
        ]


def _description(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {shown(value, 60)}"


def make_request(
    prompt: str, subject: str, target: str, target_old: str | None = None, id: str | None = None
) -> Request:
    """Build a request from a dataset's texts.

    A subject that the prompt has in other capitals is spelled as in the prompt, if it is there as whole words. If it
    occurs several times, the first occurrence as a whole word is meant. Raises Skip with the reason, e.g.
    SubjectAbsent.
    """
    target, subject = target.strip(), subject.strip()
    if "{}" not in prompt and subject:
        subject = next(iter(subject_forms(prompt, subject)), subject)
    if "{}" not in prompt and subject and prompt.count(subject) != 1:  # at its one place it is clear
        words = rf"(?<!\w){re.escape(subject)}(?!\w)"
        match = re.search(words, prompt, 0 if subject in prompt else re.IGNORECASE)
        subject = match.group() if match else subject
        if prompt.count(subject) > 1:
            at = match.start() if match else prompt.index(subject)
            prompt = prompt[:at] + "{}" + prompt[at + len(subject) :]
    wrong = request_problems(prompt, subject, target)
    if wrong:
        absent = subject and target and "{}" not in prompt and subject not in prompt
        raise (SubjectAbsent if absent else Skip)("; ".join(wrong))
    old = target_old.strip() if target_old and target_old.strip() else None
    return Request(prompt, subject, target, old, id)


def no_facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count nothing: for datasets without counts of their own, whose cases need not be held in memory."""
    return {}


@dataclass(frozen=True)
class Dataset:
    """A published dataset: its metadata, and functions that recognise and convert its records."""

    name: str
    """Public id: the file name of its module."""
    title: str
    paper: str
    """Authors' title, venue, arXiv id."""
    licence: str
    """As its source states it, or ``not stated``."""
    home: str
    """Where to get it, in words."""
    fits: Callable[[Any], bool]
    """Whether a record has this dataset's fields; used to recognise files."""
    cases: Callable[[Record, str], Iterator[Case]]
    """Convert one record to cases under a variant. Raises Skip or Malformed."""
    variants: tuple[str, ...] = ("",)
    """Conventions or parts that share a schema, e.g. ``true`` and ``alt``; the first is the default."""
    records: Callable[[Any, str], Iterator[Any]] | None = None
    """Unpack a file that is not a list of records, given its parsed document and the variant."""
    facts: Callable[[Sequence[Case]], Mapping[str, Any]] = no_facts
    """Dataset-specific counts for the check, computed from the cases, e.g. rows per category."""
    hub: str | None = None
    """Repository on the Hugging Face Hub and file in it, ``owner/name:path``; None: not on the Hub."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Per variant (``""``: all), its file name in the data folder."""
    urls: Mapping[str, str] = field(default_factory=dict)
    """Per variant (``""``: all), where its file is downloaded from: a URL, or ``owner/name:path`` on the Hub if each
    variant is a file."""
    gate: Callable[[str], Callable[[Record, Case], None]] | None = None
    """For one pass under a variant, returns a function that may refuse a case because of earlier ones; raises Skip."""
    read_file: Callable[[Path], Iterator[Any]] | None = None
    """Read the records of a file in a dataset-specific format."""
    fits_file: Callable[[Path], bool] | None = None
    """Whether a file is in that format, from its first bytes; None: such a file must be named with its dataset."""
    variants_of: Callable[[Sequence[Any]], Sequence[str]] | None = None
    """Possible variants given a file's first records, likeliest first; empty: the records do not tell."""
