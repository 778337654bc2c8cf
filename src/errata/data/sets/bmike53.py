"""BMIKE-53: zsRE (MzsRE), CounterFact (MCounterFact) and WikiFactDiff in English and 52 other languages.

A record holds the same row in two languages or more, ``{en: row, zh-cn: row}``; a row has ``subject``, ``src``,
``rephrase``, ``alt``, ``loc``, ``loc_ans``, ``portability`` with ``New Question`` and ``New Answer``, and in
WikiFactDiff ``old``, the answer before. The languages are those of the record; the variant says in which the edit
is made and which are asked:

``cross``: the edit is made in English, and everything is asked in English and in the other languages; what is asked
in another language is of kinds of its own, ``cross_efficacy``, ``cross_paraphrase``, ``cross_locality``,
``cross_one_hop``. ``reverse``: the edit is made in another language, and asked in it and in English. ``en`` and
``other``: edited and asked in one language. Where a translated subject does not occur in the translated prompt,
which is so for a quarter of the Chinese rows of MCounterFact, no request can be made in that language: under
``reverse`` and ``other`` such rows are left out and counted; under ``cross`` they are asked.

Requests and probes tell their language, by the record's names, so that results are averaged by the language edited in
and by that asked in (:mod:`errata.evaluation.metrics.languages`). Bi-ZsRE (Wang et al., "Cross-Lingual Knowledge
Editing in Large Language Models", arXiv 2309.08952) has records of the same form, ``{en: row, zh: row}``.

The files of MzsRE and MCounterFact have no old answers. Prompts are used unchanged; no question mark is appended.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from errata.data._base import Dataset, Malformed, Record
from errata.data.sets._parts import (
    ZSRE,
    has,
    locality_probe,
    name_of,
    read_request,
    refuse_unchanged,
    rival_to,
    spellings,
)
from errata.types import Case, Probe, Request

CROSS, REVERSE, ENGLISH, OTHER = "cross", "reverse", "en", "other"
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[-_][A-Za-z]{2,8})*$")


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; into one for each other language where the edit is made in it.

    Raises Skip or Malformed.
    """
    rows = {language: _row(record, language) for language in _languages(record)}
    name = f"bmike53:{_name(record)}"
    if variant in (CROSS, ENGLISH):
        others = [language for language in rows if language != "en"] if variant == CROSS else []
        yield _case(name, rows, "en", others)
        return
    for language in rows:
        if language != "en":
            languages = ["en"] if variant == REVERSE else []
            yield _case(f"{name} {language}", rows, language, languages)


def _languages(record: Record) -> list[str]:
    if not fits(record.value):
        raise Malformed("expected a row in English, en, and the same in another language")
    return list(record.value)


def _row(record: Record, language: str) -> Record:
    return Record(record.value[language], f"{record.where}, {language}", record.index, record.omissions)


def _name(record: Record) -> str:
    return name_of(_row(record, "en"), "case_id")


def _case(name: str, rows: Mapping[str, Record], language: str, others: Sequence[str]) -> Case:
    """Build a case with the edit in one language and probes in it and in others."""
    row = rows[language]
    request = replace(_request(row, f"{name} {language}" if others else name), language=language)
    probes = [replace(probe, language=language) for probe in _probes(row, "")]
    for other in others:
        probes += [replace(probe, language=other) for probe in _probes(rows[other], "cross_")]
    return Case(name, request, tuple(probes))


def _request(row: Record, name: str) -> Request:
    old = row.texts("old")
    refuse_unchanged(row.text("alt"), old)
    return read_request(row, ZSRE, old, name)


def _probes(row: Record, prefix: str) -> Iterator[Probe]:
    """Yield the probes of a row; their kinds begin with ``prefix``."""
    answers, before = spellings(row.text("alt")), spellings("", row.texts("old"))
    rival = rival_to(answers, before[0] if before else None, before)
    yield Probe(f"{prefix}efficacy", row.text("src").strip(), answers, before, rival)
    for text in row.texts("rephrase"):
        yield Probe(f"{prefix}paraphrase", text.strip(), answers, before, rival)
    right = spellings("", row.texts("loc_ans"))
    if right and row.texts("loc"):
        yield locality_probe(f"{prefix}locality", row.text("loc").strip(), right)
    else:
        row.omissions["locality without question or answer"] += 1
    if row.texts("portability.New Question"):
        question = row.text("portability.New Question").strip()
        yield Probe(f"{prefix}one_hop", question, spellings(row.text("portability.New Answer")), ())


def fits(value: Any) -> bool:
    """Whether a record holds rows by language, English among them."""
    if not has(value, "en") or len(value) < 2:
        return False
    return all(_LANGUAGE.match(str(key)) and has(row, "src", "alt", "subject") for key, row in value.items())


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count probes of the edit's own language and of others."""
    crossed = Counter(probe.kind.startswith("cross_") for case in cases for probe in case.probes)
    return {"probes in the edit's language": crossed[False], "probes in another language": crossed[True]}


DATASET = Dataset(
    name="bmike53",
    title="BMIKE-53 (MzsRE, MCounterFact, WikiFactDiff)",
    paper="BMIKE-53: Investigating Cross-Lingual Knowledge Editing with In-Context Learning, ACL 2025, "
    "arXiv 2406.17764",
    licence="MIT (repository)",
    home="GitHub shaobo9856/EasyEdit, data/MzsRE, data/MCounterFact and data/WikiFactDiff, a file a pair of languages",
    fits=fits,
    cases=cases,
    variants=(CROSS, REVERSE, ENGLISH, OTHER),
    facts=facts,
    files={"": "mzsre_test_duplicate_enzh-cn.json"},
)
