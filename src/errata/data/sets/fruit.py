"""FRUIT: articles to be rewritten when other articles bring news.

A record has ``input``: the article's sentences, numbered ``[0] [1] ...``, then ``[CONTEXT]``, then the
evidence, numbered ``(0) (1) ...``; and ``output``: the new article, where ``[i]`` stands for a sentence
taken over and ``(j)`` before a sentence names its evidence. The published files are TFRecords; the same as
JSON lines, which the authors' script writes, is read as well. It spells the fields ``inputs`` and
``targets``, as some files do.

It measures rewriting with the evidence in view, not what is in the weights: the request is to continue the
whole input with the new article in plain text, and its one probe, of form ``long``, has the new article as
answer and the old one as the answer before, so that what changed can be told apart. Left aside:
``generatable_surfaces`` and the lists of evidence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errata.data import _tfrecord
from errata.data._base import Dataset, Malformed, Record
from errata.data.sets._files import records_of
from errata.data.sets._parts import has, name_of, whole
from errata.types import Case, Probe

CONTEXT = "[CONTEXT]"
_TAKEN_OVER = re.compile(r"\[(\d+)\]")
_EVIDENCE = re.compile(r"\((\d{1,3})\)\s")
_SENTENCE_ENDS = re.compile(r"[.!?][\"'”’)\]]*\s*$")


def read_file(path: Path) -> Iterator[Any]:
    """Read a TFRecord or JSON lines file; a damaged record is given as the Malformed that says so.

    Raises DataError and BrokenOff as :func:`errata.data._tfrecord.examples`.
    """
    if path.suffix.lower() in (".json", ".jsonl"):
        yield from (record.value for record in records_of(path))
        return
    for features in _tfrecord.examples(path):
        yield features if isinstance(features, Malformed) else _plain(features)


def _plain(features: dict[str, _tfrecord.Feature]) -> dict[str, Any] | Malformed:
    """Return features of one value each as fields, bytes as text."""
    fields: dict[str, Any] = {}
    for name, values in features.items():
        value: Any = values[0] if len(values) == 1 else values
        try:
            fields[name] = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            return Malformed(f"{name}: bytes that are not UTF-8 text: {error}")
    return fields


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case of one long probe. Raises Malformed."""
    if isinstance(record.value, Malformed):
        raise record.value
    plural = record.get("input") is None
    given, output = (
        record.text("inputs" if plural else "input"),
        record.text("targets" if plural else "output"),
    )
    article, found, evidence = given.partition(CONTEXT)
    if not found:
        raise Malformed(f"expected {CONTEXT} between article and evidence, found {given!r:.60}")
    old = sentences(article)
    new = updated(old, evidence, output)
    name = name_of(record)
    wanted = whole(given.strip(), new, " ".join(old), id=name)
    yield Case(f"fruit:{name}", wanted, (Probe("long", wanted.text, (new,), (" ".join(old),), form="long"),))


def sentences(article: str) -> list[str]:
    """Take the numbered sentences of an article apart. Raises Malformed.

    Numbers count up from 0; others in square brackets belong to the text.
    """
    found: list[str] = []
    at = article.find("[0]")
    while at >= 0:
        begin = at + len(f"[{len(found)}]")
        at = article.find(f" [{len(found) + 1}] ", begin)
        found.append(article[begin : at if at >= 0 else None].strip())
        at += at >= 0  # from the space to the bracket
    if not found:
        raise Malformed(f"expected an article of numbered sentences, found {article!r:.60}")
    return found


def updated(old: list[str], evidence: str, output: str) -> str:
    """Return an output as plain text, sentences taken over put in, names of evidence left out.

    A number in round brackets names evidence where a sentence begins and there is evidence of that number;
    elsewhere, as in a year, it belongs to the text. Raises Malformed.
    """
    numbers = {int(number) for number in _EVIDENCE.findall(evidence)}
    pieces = []
    for i, piece in enumerate(_TAKEN_OVER.split(output)):
        if i % 2 and int(piece) >= len(old):
            raise Malformed(f"output takes over sentence [{piece}] of {len(old)}")
        pieces.append(old[int(piece)] if i % 2 else _without_evidence(piece.strip(), numbers))
    return " ".join(piece for piece in pieces if piece)


def _without_evidence(text: str, numbers: set[int]) -> str:
    """Leave out what names evidence at the beginning of a sentence; several may follow one another."""
    made, at = [], 0
    for found in _EVIDENCE.finditer(f"{text} "):
        between = text[at : found.start()]
        begins = not between.strip() or _SENTENCE_ENDS.search(between)
        if begins and int(found.group(1)) in numbers:
            made.append(between)
            at = found.end()
    return "".join([*made, text[at:]]).strip()


def fits(value: Any) -> bool:
    """Whether a record holds an article with evidence, and a text to be made of it."""
    for given, output in (("input", "output"), ("inputs", "targets")):
        if has(value, given, output) and isinstance(value[given], str) and CONTEXT in value[given]:
            return True
    return False


DATASET = Dataset(
    name="fruit",
    title="FRUIT",
    paper="FRUIT: Faithfully Reflecting Updated Information in Text, NAACL 2022, arXiv 2112.08634",
    licence="Apache-2.0 (repository)",
    home="gs://gresearch/FRUIT/dataset, e.g. gold_test; GitHub google-research/language, language/fruit",
    fits=fits,
    cases=cases,
    read_file=read_file,
    fits_file=_tfrecord.is_tfrecord,
    files={"": "article_pairs.update.diff.all.text.reference.tfrecords"},
)
