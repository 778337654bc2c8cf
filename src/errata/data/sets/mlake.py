"""MLaKE: facts in five languages, as open questions and as choices, and questions two hops away.

Single hop: ``question``, ``o_answer`` with ``o_answer_aliases`` (before the edit) and ``e_answer`` with
``e_answer_aliases`` (after it); ``o_prompt`` and ``e_prompt`` are the answers as sentences. The request is the
question with the new answer, and the whole question is used as the subject, which the records do not name. Where
the sentence after the edit contains the new answer once, the text before it is a paraphrase probe. With ``options``
the answers are letters of sentences: the target is then the sentence, and the probe a choice among them.

Multi hop: a question whose answer follows from an edit, ``e_prompt``, given only as a sentence; files from before the
edit have the question alone. Neither has a request, so such rows are skipped with that reason. :func:`with_multi_hop`
adds multi-hop questions to the single-hop rows with the same sentence. Not used: ``triples`` and ``relations``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip
from errata.data.sets._files import read_records
from errata.data.sets._parts import (
    choice,
    count,
    efficacy,
    has,
    name_of,
    question_request,
    refuse_unchanged,
    spellings,
)
from errata.types import Case, Probe

SINGLE, CHOICE, MULTI = "single-hop", "single-hop-choice", "multi-hop"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case, by its shape; the variant only names the file. Raises Skip or Malformed."""
    if not has(record.value, "o_answer", "e_answer") or not has(record.value, "o_prompt"):
        raise Skip(
            "a multi-hop question has no request: its edit is given as a sentence, or not at all; add it to the "
            "single-hop rows with errata.data.sets.mlake.with_multi_hop"
        )
    name = f"mlake:{name_of(record)}"
    question = record.text("question").strip()
    if has(record.value, "options"):
        yield _choice(record, name, question)
        return
    new = spellings(record.text("e_answer"), record.texts("e_answer_aliases"))
    old = spellings(record.text("o_answer"), record.texts("o_answer_aliases"))
    refuse_unchanged(new[0], old[:1])
    request = question_request(question, new[0], old[0], name)
    probe = efficacy(request, new, old)
    probes = [probe]
    for text in record.texts("e_prompt"):
        head, answer, tail = text.partition(new[0])
        if answer and head.strip() and new[0] not in tail:
            probes.append(Probe("paraphrase", head.strip(), probe.answers, probe.before, probe.rival))
    for hop in record.records("multi_hop"):
        right = spellings(hop.text("e_answer"), hop.texts("e_answer_aliases"))
        before = spellings("", hop.texts("o_answer"))
        probes.append(Probe("multi_hop", hop.text("question").strip(), right, before))
    yield Case(name, request, tuple(probes))


def _choice(record: Record, name: str, question: str) -> Case:
    options = [text.strip() for text in record.texts("options", required=True)]
    new, old = (_option(record, field, options) for field in ("e_answer", "o_answer"))
    refuse_unchanged(new, (old,))
    request = question_request(question, new, old, name)
    return Case(name, request, (choice("efficacy", question, new, options, old, old),))


def _option(record: Record, field: str, options: Sequence[str]) -> str:
    letter = record.text(field).strip()
    number = ord(letter) - ord("A") if len(letter) == 1 else -1
    if not 0 <= number < len(options):
        raise Malformed(
            f"{field}: expected the letter of one of {len(options)} options, found {letter!r:.60}"
        )
    return options[number]


def with_multi_hop(single: Path, multi: Path) -> Iterator[dict[str, Any]]:
    """Yield the single-hop rows with the multi-hop questions that follow from the same edit, under ``multi_hop``.

    ``multi``: the file of questions after the edits, ``new_LANGUAGE_qa.json``. Raises DataError where a file cannot
    be read, Malformed for a record without its sentence.
    """
    hops: dict[str, list[Any]] = {}
    for record in read_records(multi):
        hops.setdefault(record.text("e_prompt").strip(), []).append(record.value)
    yield from _with_hops((record.value for record in read_records(single)), hops)


def _with_hops(rows: Iterable[Any], hops: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        questions = hops.get(str(row.get("e_prompt")).strip(), [])
        yield {**row, "multi_hop": questions}


def fits(value: Any) -> bool:
    """Whether a record is a question with answers before or after an edit."""
    return has(value, "question") and (
        has(value, "e_prompt", "e_answer") or has(value, "o_answer", "o_answer_aliases")
    )


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the three kinds of files by their fields."""
    if any(has(record, "options") for record in records):
        return (CHOICE,)
    return (SINGLE,) if any(has(record, "o_prompt", "e_prompt") for record in records) else (MULTI,)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count questions by kind."""
    return {kind: count(cases, kind) for kind in ("paraphrase", "multi_hop") if count(cases, kind)}


DATASET = Dataset(
    name="mlake",
    title="MLaKE",
    paper="MLaKE: Multilingual Knowledge Editing Benchmark for Large Language Models, COLING 2025, arXiv 2404.04990",
    licence="not stated",
    home="GitHub Hi-archers/MLaKE, dataset, a file a language",
    fits=fits,
    cases=cases,
    variants=(SINGLE, CHOICE, MULTI),
    facts=facts,
    files={SINGLE: "en_qa.json", CHOICE: "en_mcqa.json", MULTI: "new_en_qa.json"},
    variants_of=variants_of,
)
