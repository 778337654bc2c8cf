"""Read labelled texts, which show a concept, from a file: records of ``text``, ``label`` and optionally ``subject``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from errata import files
from errata.data.sets._files import read_records
from errata.errors import RequestError, listing, shown
from errata.types import Concept, LabelledText

FIELDS = ("text", "label", "subject")


def read_concept(path: Path, name: str) -> Concept:
    """Read a concept's labelled texts. Raises RequestError listing every faulty record, DataError for the file."""
    texts, wrong = list[LabelledText](), list[str]()
    for record in read_records(path):
        text, why = _text(record.value)
        wrong += [f"{record.where}: {one}" for one in why]
        texts += [] if text is None else [text]
    if wrong:
        raise RequestError(f"{path}: {len(wrong):,} problem{'s' * (len(wrong) > 1)}\n{listing(wrong)}")
    return Concept(name, tuple(texts))


def write_texts(path: Path, texts: Iterable[LabelledText]) -> int:
    """Write labelled texts as JSON lines; return their number. The file appears only when it is complete."""
    count = 0
    with files.replacing(path, RequestError) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        for text in texts:
            count += 1
            record = {name: getattr(text, name) for name in FIELDS if getattr(text, name) is not None}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return count


def _text(value: Any) -> tuple[LabelledText | None, list[str]]:
    if not isinstance(value, Mapping):
        return None, [f"expected a record with text and label, found {shown(value, 60)}"]
    unknown = [
        f"unknown field {shown(key)}; expected {', '.join(FIELDS)}" for key in value if key not in FIELDS
    ]
    wrong = unknown + [f"missing {name}" for name in FIELDS[:2] if name not in value]
    wrong += [
        f"{name} must be a text, found {shown(value[name], 60)}"
        for name in FIELDS
        if value.get(name) is not None and not isinstance(value[name], str)
    ]
    if wrong:
        return None, wrong
    text = LabelledText(value["text"], value["label"], value.get("subject"))
    return text, text.problems()
