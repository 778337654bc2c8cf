"""DUNE: edits stated as a sentence, and questions that the sentence answers.

A file has two parallel lists, ``edits`` and ``test_inputs``. ``new_info``: a news item that begins with its date, and
questions with lettered choices and the right letter. ``arithmetic``: an equation, and a word problem that it solves.
The request is to complete the date with the news, or the left side of the equation with its result.

The files ``*_locality`` have the same format but no edits: their sentences are true anyway, and the answers to their
questions must not change. Their rows are skipped with that reason; :func:`locality` returns their questions and
:func:`with_locality` adds them to cases. The four files are told apart by content: locality news is from 2021, edited
news from 2022; equations in the locality file have a single operation. All fields are used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from errata.data import formats
from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._parts import choice, count, efficacy, has, locality_probe, name_of
from errata.errors import DataError
from errata.types import Case, Probe, Request

NEWS, ARITHMETIC = "new_info", "arithmetic"
LOCALITY = "_locality"
NEW = 2022
"""Year of the edited news; news of the locality file is older."""
_NEWS = re.compile(r"\s*(?P<date>(?=.{0,40}\d)\S.{2,40}?)\s*(?P<dash>[–—:-])\s+(?P<news>\S.*)", re.DOTALL)
_EQUATION = re.compile(r"\s*(?P<left>\S.*?)\s*=\s*(?P<right>\S+)\s*")
_LETTER = re.compile(r"(?<!\w)\(?([A-Ea-e])[.):]\s*\S")
_LETTERS = ("A", "B", "C", "D")


def records(document: Any, variant: str) -> Iterator[Any]:
    """Pair the two lists of a file. Raises Malformed."""
    edits, inputs = (
        (document.get(name) for name in ("edits", "test_inputs")) if fits(document) else (None, None)
    )
    if not isinstance(edits, list) or not isinstance(inputs, list) or len(edits) != len(inputs):
        raise Malformed("expected the lists edits and test_inputs, of one length")
    for edit, questions in zip(edits, inputs, strict=True):
        yield {"edit": edit, "test_inputs": questions}


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one row into a case. Raises Skip, for a row of a locality file also, and Malformed."""
    name = f"dune:{variant.removesuffix(LOCALITY)}/{name_of(record)}"
    request = _request(record.text("edit"), name)
    probes = list(_probes(record, request, keep=False))
    if variant.endswith(LOCALITY):
        raise Skip(
            "a locality row has no edit: its questions must keep their answers under other edits; add them to "
            "cases with errata.data.sets.dune.with_locality"
        )
    yield Case(name, request, (efficacy(request), *probes))


def _request(statement: str, name: str) -> Request:
    equation = _EQUATION.fullmatch(statement)
    if equation:
        return make_request("{} =", equation["left"], equation["right"], id=name)
    news = _NEWS.fullmatch(statement)
    if news is None:
        raise Skip(f"expected an equation, or news that begins with its date, found {statement!r:.60}")
    space = "" if news["dash"] == ":" else " "
    return make_request(f"{{}}{space}{news['dash']}", news["date"], news["news"], id=name)


def _probes(record: Record, request: Request, *, keep: bool) -> Iterator[Probe]:
    """Yield the probes of a row; ``keep``: their answers must not change."""
    questions = record.get("test_inputs")
    if isinstance(questions, str) and questions.strip():
        answers = (request.target,)
        yield Probe("word_problem", questions.strip(), answers, answers if keep else ())
        return
    if not isinstance(questions, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in questions
    ):
        raise Malformed(
            f"test_inputs: expected a problem, or questions with letters, found {questions!r:.60}"
        )
    for question, letter in questions:
        if not isinstance(question, str) or not question.strip() or not isinstance(letter, str):
            raise Malformed(f"test_inputs: expected a question and a letter, found {question!r:.60}")
        marks = tuple(dict.fromkeys(mark.upper() for mark in _LETTER.findall(question)))
        letters = marks if letter.strip() in marks else _LETTERS
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
            request = _request(record.text("edit"), f"locality {index}")
            probes += [
                locality_probe("locality", p.prompt, p.answers)
                if p.form == "short"
                else replace(p, kind="locality")
                for p in _probes(record, request, keep=True)
            ]
    return probes


def with_locality(cases: Sequence[Case], probes: Sequence[Probe]) -> list[Case]:
    """Add the probes of :func:`locality` to cases; of n cases the i-th gets every n-th, so each is used once."""
    return [replace(case, probes=(*case.probes, *probes[i :: len(cases)])) for i, case in enumerate(cases)]


def fits(value: Any) -> bool:
    """Whether a document has the two lists, or a row is one of theirs."""
    return has(value, "edits", "test_inputs") or has(value, "edit", "test_inputs")


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the four files apart by content, see the module's docstring."""
    texts = [str(record["edit"]) for record in records if has(record, "edit")]
    if any(has(record, "test_inputs") and isinstance(record["test_inputs"], str) for record in records):
        several = any(len(re.findall(r"\s[-+*/]\s", text)) > 1 for text in texts)
        return (ARITHMETIC,) if several else (ARITHMETIC + LOCALITY,)
    years = [int(match.group()) for text in texts if (match := re.search(r"\b20\d\d\b", text[:40]))]
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
