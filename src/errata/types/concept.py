"""Labelled texts: what shows a concept, and the request to take it out of a model. Loads the standard library only."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from errata.errors import RequestError, shown


@dataclass(frozen=True)
class LabelledText:
    """A text with a label, and optionally the part of it that the label is about."""

    text: str
    label: str
    subject: str | None = None
    """Part of the text that has the label; None: the whole text."""

    def problems(self) -> list[str]:
        """List what is wrong with it."""
        fields: dict[str, Any] = {"text": self.text, "label": self.label}
        wrong = [f"{name} must be a text that is not empty, found {shown(value)}"
                 for name, value in fields.items() if not isinstance(value, str) or not value.strip()]  # fmt: skip
        if not wrong and self.subject is not None and (not self.subject or self.subject not in self.text):
            wrong.append(f"subject {shown(self.subject)} does not occur in the text {shown(self.text)}")
        return wrong


@dataclass(frozen=True)
class ConceptRecord:
    """What is stored of a :class:`Concept` in the record of an edit: names, counts and identity, no texts."""

    name: str
    labels: dict[str, int]
    """Number of texts of each label."""
    digest: str
    """Identity of texts and labels, 16 hex digits."""

    @property
    def id(self) -> str:
        """What it is named by among the requests of an edit: its name."""
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Concept:
    """A property of texts that a model is to forget, shown by labelled texts. Raises RequestError listing errors."""

    name: str
    """What the labels tell apart, e.g. gender."""
    texts: tuple[LabelledText, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", tuple(self.texts))
        wrong = [f"text {i}: {one}" for i, text in enumerate(self.texts, 1) for one in text.problems()]
        name: Any = self.name
        if not isinstance(name, str) or not name.strip():
            wrong.insert(0, f"the concept needs a name, found {shown(self.name)}")
        if not wrong and len(self.labels) < 2:
            found = ", ".join(map(repr, self.labels)) or "none"
            wrong.append(f"labelled texts need at least two labels to tell apart, found {found}")
        if wrong:
            raise RequestError("\n".join(wrong))

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted({text.label for text in self.texts}))

    @cached_property
    def record(self) -> ConceptRecord:
        """Name, counts by label and content hash."""
        content = json.dumps([[one.text, one.label, one.subject] for one in self.texts], ensure_ascii=False)
        digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        counts = Counter(text.label for text in self.texts)
        return ConceptRecord(self.name, dict(sorted(counts.items())), digest)

    @property
    def id(self) -> str:
        """The name, for messages."""
        return self.name

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data."""
        return self.record.to_dict()

    def split(self, share: float, *, seed: int = 0) -> tuple[Concept, Concept]:
        """Return a part to fit on and a part to measure on, which share no subject (no text, where it has none).

        ``share``: of the subjects of each label that are held out, at least one. Raises RequestError where a label has
        too few subjects to be in both parts.
        """
        held: set[str] = set()
        for label in self.labels:
            names = sorted({_unit(text) for text in self.texts if text.label == label} - held)
            random.Random(f"errata-concept-{seed}-{label}").shuffle(names)
            held |= set(names[: max(1, round(share * len(names)))])
        parts = [tuple(t for t in self.texts if (_unit(t) in held) is out) for out in (False, True)]
        for part in parts:
            missing = sorted(set(self.labels) - {text.label for text in part})
            if missing:
                raise RequestError(
                    f"label {missing[0]!r} has too few different subjects to hold a share of {share:g} out; give more "
                    "texts"
                )
        return Concept(self.name, parts[0]), Concept(self.name, parts[1])

    def indices(self, texts: Sequence[LabelledText] | None = None) -> list[int]:
        """Return the number of each text's label among the sorted labels."""
        at = {label: number for number, label in enumerate(self.labels)}
        return [at[text.label] for text in (self.texts if texts is None else texts)]


def _unit(text: LabelledText) -> str:
    return text.text if text.subject is None else text.subject
