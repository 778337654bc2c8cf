"""DUNE: edits told as a sentence, and questions that the sentence answers.

A file has two lists side by side, ``edits`` and ``test_inputs``. ``new_info``: a piece of news headed by its date,
and questions with lettered choices and the right letter. ``arithmetic``: an equation, and a word problem that it
solves. The request is to continue the date with the news, or the left side of the equation with its result.

The files ``*_locality`` look the same but hold no edits: their sentences say what is so anyway, and their questions
must be answered as before. Their rows are skipped with that reason; :func:`locality` gives their questions, and
:func:`with_locality` puts them to cases. Of the four files only the content tells which is which: news of 2021 is
older than what is edited (2022), and equations of the locality file have one operation. Left aside: nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from errata.data import formats
from errata.data._base import Dataset, Malformed, Record, Skip, request
from errata.data.sets._parts import choice, count, efficacy, has, kept, name_of
from errata.errors import DataError
from errata.types import Case, Probe, Request

NEWS, ARITHMETIC = "new_info", "arithmetic"
LOCALITY = "_locality"
NEW = 2022
"""Year of the news that is edited; that of the locality file is older."""
_NEWS = re.compile(r"\s*(?P<date>(?=.{0,40}\d)\S.{2,40}?)\s*(?P<dash>[–—:-])\s+(?P<news>\S.*)", re.DOTALL)
_EQUATION = re.compile(r"\s*(?P<left>\S.*?)\s*=\s*(?P<right>\S+)\s*")
_LETTER = re.compile(r"(?<!\w)\(?([A-Ea-e])[.):]\s*\S")
_LETTERS = ("A", "B", "C", "D")


def records(document: Any, variant: str) -> Iterator[Any]:
    """Put the two lists of a file side by side. Raises Malformed."""
    edits, inputs = (
        (document.get(name) for name in ("edits", "test_inputs")) if fits(document) else (None, None)
    )
    if not isinstance(edits, list) or not isinstance(inputs, list) or len(edits) != len(inputs):
        raise Malformed("expected the lists edits and test_inputs, of one length")
    for edit, asked in zip(edits, inputs, strict=True):
        yield {"edit": edit, "test_inputs": asked}


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one row into a case. Raises Skip, for a row of a locality file also, and Malformed."""
    name = f"dune:{variant.removesuffix(LOCALITY)}/{name_of(record)}"
    wanted = _request(record.text("edit"), name)
    probes = list(_asked(record, wanted, keep=False))
    if variant.endswith(LOCALITY):
        raise Skip(
            "a row on locality holds no edit: its questions keep their answers under other edits; put them to "
            "cases with errata.data.sets.dune.with_locality"
        )
    yield Case(name, wanted, (efficacy(wanted), *probes))


def _request(statement: str, name: str) -> Request:
    equation = _EQUATION.fullmatch(statement)
    if equation:
        return request("{} =", equation["left"], equation["right"], id=name)
    news = _NEWS.fullmatch(statement)
    if news is None:
        raise Skip(f"expected an equation, or news headed by its date, found {statement!r:.60}")
    space = "" if news["dash"] == ":" else " "
    return request(f"{{}}{space}{news['dash']}", news["date"], news["news"], id=name)


def _asked(record: Record, wanted: Request, *, keep: bool) -> Iterator[Probe]:
    """Ask what a row asks; ``keep``: it must be answered as before."""
    asked = record.get("test_inputs")
    if isinstance(asked, str) and asked.strip():
        answers = (wanted.target,)
        yield Probe("word_problem", asked.strip(), answers, answers if keep else ())
        return
    if not isinstance(asked, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in asked):
        raise Malformed(f"test_inputs: expected a problem, or questions with letters, found {asked!r:.60}")
    for question, letter in asked:
        if not isinstance(question, str) or not question.strip() or not isinstance(letter, str):
            raise Malformed(f"test_inputs: expected a question and a letter, found {question!r:.60}")
        found = tuple(dict.fromkeys(mark.upper() for mark in _LETTER.findall(question)))
        letters = found if letter.strip() in found else _LETTERS
        right = letter.strip()
        kind = "question_kept" if keep else "question"
        yield choice(kind, f"{question.strip()}\nAnswer:", right, letters, right if keep else None)


def locality(path: Path) -> list[Probe]:
    """Return the questions of a locality file, with the answers that must stay.

    Raises DataError where the file cannot be read, Malformed naming a row that is none.
    """
    probes: list[Probe] = []
    for row in formats.rows(path, formats.layout(path)):
        if row.fault:
            raise DataError(f"{path}, {row.where}: {row.fault}")
        for index, value in enumerate(records(row.value, NEWS + LOCALITY)):
            record = Record(value, f"{path}, row {index + 1}", index)
            wanted = _request(record.text("edit"), f"locality {index}")
            probes += [
                kept("locality", p.prompt, p.answers) if p.form == "short" else replace(p, kind="locality")
                for p in _asked(record, wanted, keep=True)
            ]
    return probes


def with_locality(cases: Sequence[Case], probes: Sequence[Probe]) -> list[Case]:
    """Put the questions of :func:`locality` to cases; of n cases the i-th gets every n-th, so all are asked once."""
    return [replace(case, probes=(*case.probes, *probes[i :: len(cases)])) for i, case in enumerate(cases)]


def fits(value: Any) -> bool:
    """Whether a document has the two lists, or a row is one of theirs."""
    return has(value, "edits", "test_inputs") or has(value, "edit", "test_inputs")


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the four files by their content, see the module's head."""
    texts = [str(record["edit"]) for record in records if has(record, "edit")]
    if any(has(record, "test_inputs") and isinstance(record["test_inputs"], str) for record in records):
        several = any(len(re.findall(r"\s[-+*/]\s", text)) > 1 for text in texts)
        return (ARITHMETIC,) if several else (ARITHMETIC + LOCALITY,)
    years = [int(found.group()) for text in texts if (found := re.search(r"\b20\d\d\b", text[:40]))]
    old = years and sum(year < NEW for year in years) * 2 > len(years)
    return (NEWS + LOCALITY,) if old else (NEWS,)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count different edits, and the questions."""
    return {
        "edits": len({case.request.text + case.request.target for case in cases}),
        "questions": count(cases, "question") + count(cases, "word_problem"),
    }


DATASET = Dataset(
    name="dune",
    title="DUNE, new information and arithmetic",
    paper="DUnE: Dataset for Unified Editing, EMNLP 2023, arXiv 2311.16087",
    licence="MIT (repository)",
    home="GitHub feyzaakyurek/dune, dune",
    fits=fits,
    cases=cases,
    variants=(NEWS, ARITHMETIC, NEWS + LOCALITY, ARITHMETIC + LOCALITY),
    records=records,
    facts=facts,
    files={name: f"{name}.json" for name in (NEWS, ARITHMETIC, NEWS + LOCALITY, ARITHMETIC + LOCALITY)},
    variants_of=variants_of,
)
