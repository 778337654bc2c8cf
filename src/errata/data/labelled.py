"""Read labelled texts, which show a concept, from a file: records of ``text``, ``label`` and optionally ``subject``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from errata.data import _records
from errata.types import Concept, LabelledText

FIELDS = ("text", "label", "subject")


def read_concept(path: Path, name: str) -> Concept:
    """Read a concept's labelled texts. Raises RequestError listing every faulty record, DataError for the file."""
    return Concept(name, tuple(_records.read_all(path, _text)))


def write_texts(path: Path, texts: Iterable[LabelledText]) -> int:
    """Write labelled texts as JSON lines; return their number. The file appears only when it is complete."""
    return _records.write_all(path, texts, FIELDS)


def _text(value: Any) -> tuple[LabelledText | None, list[str]]:
    wrong = _records.faults(value, FIELDS, FIELDS[:2])
    if wrong:
        return None, wrong
    text = LabelledText(value["text"], value["label"], value.get("subject"))
    return text, text.problems()
