"""StereoSet: of three sentences about a group, which one a model finds more probable.

Its file is a JSON document, ``data.intrasentence`` and ``data.intersentence``; read are the former. A record has a
``target`` (the group: ``schoolgirl``), a ``bias_type``, a ``context`` with ``BLANK`` and three ``sentences``, the
context filled by a word: one a ``stereotype``, one an ``anti-stereotype``, one ``unrelated`` (``gold_label``).

A case is a group with all its sentences, since scores are averaged over groups. Each record is a probe of kind
``stereotype``, a choice between three whole sentences after nothing, in the order above; the first two are accepted.
The variant is the bias type, ``all`` for every one. Requests ask for the word against the stereotype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip
from errata.data.sets._parts import has, question_request
from errata.types import Case, Probe, Request

TYPES = ("gender", "profession", "race", "religion")
ALL = "all"
LABELS = ("stereotype", "anti-stereotype", "unrelated")
BLANK = "BLANK"


def records(document: Any, variant: str) -> Iterator[Any]:
    """Group the document's records of a bias type by target. Raises Malformed for another document."""
    rows = (
        document.get("data", {}).get("intrasentence") if isinstance(document.get("data"), Mapping) else None
    )
    if not isinstance(rows, list):
        raise Malformed("expected a document with data.intrasentence, a list of records")
    groups: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        if not has(row, "target", "bias_type", "context", "sentences"):
            raise Malformed(f"expected target, bias_type, context and sentences, found {row!r:.80}")
        if variant in (ALL, row["bias_type"]):
            groups.setdefault((row["bias_type"], str(row["target"])), []).append(row)
    for (kind, target), members in groups.items():
        yield {"target": target, "bias_type": kind, "intrasentence": members}


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn the records of one group into a case. Raises Skip or Malformed."""
    kind, target = record.text("bias_type"), record.text("target").strip()
    rows = record.records("intrasentence", required=True)
    if not rows:
        raise Malformed("intrasentence: expected at least one record, found none")
    sentences = [_sentences(row) for row in rows]
    name = f"stereoset:{kind}:{target}"
    probes = [Probe("stereotype", "", three[:2], (), form="choice", choices=three) for three in sentences]
    asked = [_request(row, three[1], name) for row, three in zip(rows, sentences, strict=True)]
    request = next((one for one in asked if one is not None), None)
    if request is None:
        raise Skip("no context has words before its blank, which a request needs")
    yield Case(name, request, tuple(probes))


def _sentences(row: Record) -> tuple[str, str, str]:
    found = {
        one.text("gold_label"): one.text("sentence").strip()
        for one in row.records("sentences", required=True)
    }
    if found.keys() != {*LABELS} or len(row.records("sentences")) != len(LABELS):
        raise Malformed(
            f"sentences: expected one each of {', '.join(LABELS)}, found {', '.join(sorted(found))}"
        )
    first, second, third = (found[label] for label in LABELS)
    return first, second, third


def _request(row: Record, sentence: str, name: str) -> Request | None:
    """Ask for the word that fills the blank; None where no text comes before it, or it cannot be told."""
    head, blank, tail = row.text("context").strip().partition(BLANK)
    tail = tail.strip()
    if not blank or not head.strip() or not sentence.startswith(head) or not sentence.endswith(tail):
        return None
    word = sentence[len(head) : len(sentence) - len(tail)].strip()
    return question_request(head.strip(), word, id=name) if word else None


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count groups by bias type, and sentences."""
    kinds = Counter(case.id.split(":")[1] for case in cases)
    return {"groups": dict(sorted(kinds.items())), "contexts": sum(len(case.probes) for case in cases)}


def fits(value: Any) -> bool:
    """Whether a record is a document of StereoSet, or a group of its records."""
    if has(value, "data") and isinstance(value["data"], Mapping):
        return "intrasentence" in value["data"]
    return has(value, "target", "bias_type", "intrasentence")


DATASET = Dataset(
    name="stereoset",
    title="StereoSet",
    paper="StereoSet: Measuring stereotypical bias in pretrained language models, ACL 2021, arXiv 2004.09456",
    licence="CC BY-SA 4.0",
    home="GitHub moinnadeem/StereoSet, data/dev.json",
    fits=fits,
    cases=cases,
    variants=(*TYPES, ALL),
    records=records,
    facts=facts,
    files={"": "stereoset_dev.json"},
)
