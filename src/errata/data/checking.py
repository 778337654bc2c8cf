"""The report on reading a dataset: counts, duplicates, conflicting requests, and every skipped row."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from errata.data._base import Malformed, SubjectAbsent
from errata.errors import ErrataError
from errata.types import Case

EXAMPLES = 10
"""How many contradicting cases a check names."""


@dataclass(frozen=True)
class Fault:
    """A skipped row and the reason."""

    where: str
    """``record 17``, ``line 3`` or ``row 5``, counted from 1."""
    reason: str


@dataclass(frozen=True)
class Conflicts:
    """Prompts that have different targets in different requests of a file."""

    prompts: int
    """Distinct prompts with more than one target."""
    cases: int
    """Cases with such a prompt."""
    examples: tuple[str, ...]
    """Names of the first of those cases."""


@dataclass(frozen=True)
class Check:
    """The report on reading a source once."""

    dataset: str
    variant: str
    path: str
    sha256: str
    """Of the file's bytes, 64 hex digits."""
    limit: int | None
    """Reading stopped after this many cases; None: the whole file was read."""
    rows: int
    """Records read, including the skipped ones."""
    cases: int
    requests: int
    prompts: int
    """Distinct prompts among the requests."""
    probes: Mapping[str, int]
    """By kind."""
    duplicates: int
    """Requests that repeat an earlier one: same prompt, subject and target."""
    conflicts: Conflicts
    subject_absent: int
    """Rows skipped because a subject does not occur in its prompt; included in ``skipped``."""
    subject_is_prompt: int
    """Requests whose whole prompt is used as the subject, as the dataset names none."""
    renamed: int
    """Cases renamed because an earlier case has the same id."""
    skipped: tuple[Fault, ...]
    malformed: tuple[Fault, ...]
    broken: str | None
    """Why reading stopped before the end of the file; None: it did not."""
    facts: Mapping[str, Any]
    """The dataset's own counts."""

    @property
    def name(self) -> str:
        """Dataset and variant, as on the command line: ``zsre/alt``."""
        return f"{self.dataset}/{self.variant}" if self.variant else self.dataset

    @property
    def unusable(self) -> bool:
        """Whether no record has the dataset's schema: the file is of another one, or of none."""
        return bool(self.malformed) and not self.cases and len(self.malformed) >= self.rows

    @property
    def no_cases(self) -> str | None:
        """Why well-formed records give no case, by the most frequent reason; None where some do."""
        if self.cases or not self.skipped:
            return None
        reason, number = Counter(fault.reason for fault in self.skipped).most_common(1)[0]
        return f"{reason} ({number} of {self.rows} rows)"

    @property
    def tag(self) -> str:
        """Dataset, variant and content, for rows of results: ``zsre/alt@0123456789ab``."""
        return f"{self.name}@{self.sha256[:12]}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"name": self.name, **asdict(self)}


class Tally:
    """Running counts. Stores 32 bytes per request and the ids of cases, no texts."""

    def __init__(self) -> None:
        self.rows = 0
        self.broken: str | None = None
        self._names: dict[str, int] = {}
        self._probes: Counter[str] = Counter()
        self._repeats: dict[str, int] = {}  # the number given to the last case of a name
        self._renamed = 0
        self._whole = 0
        self._absent = 0
        self._skipped: list[Fault] = []
        self._malformed: list[Fault] = []
        self._prompts = array("Q")  # per request the hash of its prompt,
        self._targets = array("Q")  # of its target,
        self._wholes = array("Q")  # of prompt, subject and target,
        self._places = array("Q")  # and the number of its case

    @property
    def cases(self) -> int:
        """The number of cases so far."""
        return len(self._names)

    def add(self, case: Case) -> Case:
        """Count a case; return it, renamed if an earlier case has its id."""
        if case.id in self._names:
            case = self._rename(case)
        for request in case.requests:
            self._prompts.append(_hash(request.text))
            self._targets.append(_hash(request.target))
            self._wholes.append(_hash(request.text, request.subject, request.target))
            self._places.append(len(self._names))
            self._whole += request.subject == request.text
        self._names[case.id] = len(self._names)
        self._probes.update(probe.kind for probe in case.probes)
        return case

    def _rename(self, case: Case) -> Case:
        number = self._repeats.get(case.id, 1) + 1
        while f"{case.id}#{number}" in self._names:
            number += 1
        self._repeats[case.id] = number
        self._renamed += 1
        name = f"{case.id}#{number}"
        request = case.request
        return replace(case, id=name, request=replace(request, id=name) if request.id == case.id else request)

    def leave_out(self, where: str, error: ErrataError | str) -> None:
        """Record a row of which at least one case is missing."""
        well_formed = isinstance(error, ErrataError) and not isinstance(error, Malformed)
        (self._skipped if well_formed else self._malformed).append(Fault(where, str(error)))
        self._absent += isinstance(error, SubjectAbsent)

    def counts(self) -> dict[str, Any]:
        """Return the counts as fields of :class:`Check`."""
        return {
            "rows": self.rows,
            "cases": len(self._names),
            "requests": len(self._prompts),
            "prompts": len(set(self._prompts)),
            "probes": dict(self._probes),
            "duplicates": len(self._wholes) - len(set(self._wholes)),
            "conflicts": self._conflicts(),
            "subject_absent": self._absent,
            "subject_is_prompt": self._whole,
            "renamed": self._renamed,
            "skipped": tuple(self._skipped),
            "malformed": tuple(self._malformed),
            "broken": self.broken,
        }

    def _conflicts(self) -> Conflicts:
        first: dict[int, int] = {}
        ambiguous = {
            prompt
            for prompt, target in zip(self._prompts, self._targets, strict=True)
            if first.setdefault(prompt, target) != target
        }
        places = {
            place for prompt, place in zip(self._prompts, self._places, strict=True) if prompt in ambiguous
        }
        names = [name for name, place in self._names.items() if place in places] if places else []
        return Conflicts(len(ambiguous), len(places), tuple(names[:EXAMPLES]))


def _hash(*texts: str) -> int:
    """Hash texts to 64 bits; among two million, the chance of a collision is about one in ten million."""
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return int.from_bytes(digest.digest(), "little")
