"""ME-PPL: texts to compute an edited model's perplexity on, to detect model collapse. It has no cases.

A record has ``Text`` and ``Corpus``, its source. It has no request, so every row is skipped with that reason;
:func:`texts` returns the texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errata.data._base import Dataset, Record, Skip
from errata.data.sets._files import read_records
from errata.data.sets._parts import has
from errata.types import Case


def texts(path: Path) -> list[str]:
    """Return the texts of a file. Raises DataError where it cannot be read, Malformed at a record without text."""
    return [record.text("Text") for record in read_records(path)]


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Skip a text, saying what it is for. Raises Skip, and Malformed for a record without one."""
    record.text("Text")
    raise Skip(
        "a text to take the perplexity of an edited model on, no case; errata.data.sets.me_ppl.texts gives it"
    )


def fits(value: Any) -> bool:
    """Whether a record is a text with its corpus."""
    return has(value, "Corpus", "Text") and len(value) == 2


DATASET = Dataset(
    name="me_ppl",
    title="ME-PPL",
    paper="The Butterfly Effect of Model Editing: Few Edits Can Trigger Large Language Models Collapse, Findings of "
    "ACL 2024, arXiv 2402.09656",
    licence="MIT (repository); the texts keep their own terms",
    home="GitHub WanliYoung/Collapse-in-Model-Editing, data/ME-PPL",
    fits=fits,
    cases=cases,
    files={"": "ME-PPL_50.json"},
)
