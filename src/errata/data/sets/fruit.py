"""FRUIT: articles to be updated with evidence from other articles.

A record has ``input``: the article's sentences, numbered ``[0] [1] ...``, then ``[CONTEXT]``, then the
evidence, numbered ``(0) (1) ...``; and ``output``: the new article, where ``[i]`` is a copy of sentence i and
``(j)`` before a sentence names its evidence. The published files are TFRecords; JSON lines as written by the
authors' script are read as well, with the fields ``inputs`` and ``targets``, as in some files.

The dataset measures rewriting with the evidence in context, not knowledge in the weights: the request is to
continue the whole input with the new article in plain text. Its one probe, of form ``long``, has the new article
as answer and the old article as the answer before the edit, so that changes can be scored. Not used:
``generatable_surfaces`` and the lists of evidence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errata.data import _tfrecord
from errata.data._base import Dataset, Malformed, Record
from errata.data.sets._files import read_records
from errata.data.sets._parts import has, name_of, question_request
from errata.types import Case, Probe

CONTEXT = "[CONTEXT]"
_COPIED_SENTENCE = re.compile(r"\[(\d+)\]")
_EVIDENCE = re.compile(r"\((\d{1,3})\)\s")
_SENTENCE_ENDS = re.compile(r"[.!?][\"'”’)\]]*\s*$")


def read_file(path: Path) -> Iterator[Any]:
    """Read a TFRecord or JSON lines file; a damaged record is given as the Malformed that says so.

    Raises DataError and Truncated as :func:`errata.data._tfrecord.examples`.
    """
    if path.suffix.lower() in (".json", ".jsonl"):
        yield from (record.value for record in read_records(path))
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
    text, output = (
        record.text("inputs" if plural else "input"),
        record.text("targets" if plural else "output"),
    )
    article, mark, evidence = text.partition(CONTEXT)
    if not mark:
        raise Malformed(f"expected {CONTEXT} between article and evidence, found {text!r:.60}")
    old = sentences(article)
    new = expand_output(old, evidence, output)
    name = name_of(record)
    request = question_request(text.strip(), new, " ".join(old), id=name)
    yield Case(
        f"fruit:{name}", request, (Probe("long", request.text, (new,), (" ".join(old),), form="long"),)
    )


def sentences(article: str) -> list[str]:
    """Split an article into its numbered sentences. Raises Malformed.

    Numbers count up from 0; others in square brackets belong to the text.
    """
    texts: list[str] = []
    at = article.find("[0]")
    while at >= 0:
        begin = at + len(f"[{len(texts)}]")
        at = article.find(f" [{len(texts) + 1}] ", begin)
        texts.append(article[begin : at if at >= 0 else None].strip())
        at += at >= 0  # from the space to the bracket
    if not texts:
        raise Malformed(f"expected an article of numbered sentences, found {article!r:.60}")
    return texts


def expand_output(old: list[str], evidence: str, output: str) -> str:
    """Return an output as plain text: copied sentences inserted, references to evidence removed.

    A number in round brackets is a reference where a sentence begins and evidence of that number exists;
    elsewhere, as in a year, it belongs to the text. Raises Malformed.
    """
    numbers = {int(number) for number in _EVIDENCE.findall(evidence)}
    pieces = []
    for i, piece in enumerate(_COPIED_SENTENCE.split(output)):
        if i % 2 and int(piece) >= len(old):
            raise Malformed(f"output takes over sentence [{piece}] of {len(old)}")
        pieces.append(old[int(piece)] if i % 2 else _without_evidence(piece.strip(), numbers))
    return " ".join(piece for piece in pieces if piece)


def _without_evidence(text: str, numbers: set[int]) -> str:
    """Remove references to evidence at the beginning of sentences; there may be several in a row."""
    pieces, at = [], 0
    for match in _EVIDENCE.finditer(f"{text} "):
        between = text[at : match.start()]
        begins = not between.strip() or _SENTENCE_ENDS.search(between)
        if begins and int(match.group(1)) in numbers:
            pieces.append(between)
            at = match.end()
    return "".join([*pieces, text[at:]]).strip()


def fits(value: Any) -> bool:
    """Whether a record holds an article with evidence, and a text to be made of it."""
    for source, output in (("input", "output"), ("inputs", "targets")):
        if has(value, source, output) and isinstance(value[source], str) and CONTEXT in value[source]:
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
