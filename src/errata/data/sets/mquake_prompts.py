"""MQuAKE's templates and prompts: wordings of relations, and few-shot demonstrations. It has no cases.

``cloze_templates.json`` and ``question_templates.json`` word each relation, ``[X]`` for the subject;
``rel-prompts.json`` holds demonstrations by relation; the text files are demonstrations for multi-hop questions,
which :func:`errata.data.sets.mquake.with_demonstrations` prepends to them, and MeLLo's prompt. Every entry is
skipped with that reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip
from errata.data.sets._parts import has
from errata.errors import DataError
from errata.types import Case

TEMPLATES, DEMONSTRATIONS = "templates", "demonstrations"
SUBJECT = "[X]"
LARGEST = 1 << 20
"""Bytes of a file of prompts at most; the published ones have 20 thousand."""
_RELATION = re.compile(r"P\d+$")
_BEGINS = re.compile(r"\s*(?:Q: .* A: |Question: .*\n(?:Thoughts|Subquestion): )")


def read_file(path: Path) -> Iterator[Any]:
    """Read the entries of a file: relations with their texts, or the demonstrations. Raises DataError, Malformed."""
    text = _text(path)
    if text.lstrip().startswith("{"):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is not JSON: {error}") from error
        yield from records(document, TEMPLATES)
        return
    yield from ({"demonstration": block.strip()} for block in re.split(r"\n\s*\n", text) if block.strip())


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path} is larger than a file of prompts: expected at most {LARGEST} bytes")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def is_prompts(path: Path) -> bool:
    """Whether a file is one of the texts: it begins with a question and its answer, or its thoughts."""
    try:
        return path.stat().st_size <= LARGEST and bool(_BEGINS.match(_text(path)))
    except (OSError, DataError):
        return False


def records(document: Any, variant: str) -> Iterator[Any]:
    """Unpack a mapping of relations to their texts. Raises Malformed."""
    if not fits(document):
        raise Malformed("expected texts by relation, such as P19")
    if has(document, "relation") or has(document, "demonstration"):
        yield document
        return
    yield from ({"relation": relation, "text": text} for relation, text in document.items())


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Skip an entry, saying what it is for. Raises Skip, and Malformed for an entry without a text."""
    if has(record.value, "relation"):
        what = "a template" if SUBJECT in record.text("text") else "demonstrations"
        raise Skip(f"{what} for a relation of MQuAKE, not a case: it has no request and no probes")
    if "Subquestion:" in record.text("demonstration"):
        raise Skip("a demonstration of MeLLo's prompt, not a case: it has no request and no probes")
    raise Skip(
        "demonstrations for MQuAKE's questions, not a case; errata.data.sets.mquake.with_demonstrations adds them"
    )


def fits(value: Any) -> bool:
    """Whether a document holds texts by relation, or an entry is one of them."""
    if has(value, "demonstration") and len(value) == 1:
        return True
    if not isinstance(value, Mapping) or not value:
        return False
    if not all(isinstance(text, str) for text in value.values()):
        return False
    names = [value["relation"]] if set(value) == {"relation", "text"} else value
    return all(_RELATION.match(str(name)) for name in names)


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell templates by the place of their subject."""
    texts = [str(record["text"]) for record in records if has(record, "text")]
    return (TEMPLATES,) if any(SUBJECT in text for text in texts) else (DEMONSTRATIONS,)


DATASET = Dataset(
    name="mquake_prompts",
    title="MQuAKE's prompts and templates",
    paper="MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions, EMNLP 2023, "
    "arXiv 2305.14795",
    licence="MIT",
    home="GitHub princeton-nlp/MQuAKE, prompts",
    fits=fits,
    cases=cases,
    variants=(TEMPLATES, DEMONSTRATIONS),
    records=records,
    files={TEMPLATES: "cloze_templates.json", DEMONSTRATIONS: "rel-prompts.json"},
    read_file=read_file,
    fits_file=is_prompts,
    variants_of=variants_of,
)
