"""TAXI: a kind is moved to another category, and should inherit the properties of that category.

Its files are tables as JSON, a mapping of columns to cells by row number. ``edits.json``: ``subj`` (the kind),
``entity`` (its new category) and ``orig_entity`` (the old one). ``edits-evaluation.json``: the same with a question
on one ``property``: ``query_fwd`` with ``fwd_choices`` and ``answer_fwd``, and ``query_rev`` with ``rev_choices``,
whose answer is the kind; ``answer_changed`` says whether the property differs between the two categories.

Variant ``evaluation`` makes a case of each question, so an edit comes as often as it has properties; ``edits``
makes one of each edit, with all its questions where the file has any. The request is ``a {} is a kind of``.
Questions are choices: ``category``, ``property`` (changes), ``property_kept`` (must not), and ``inverse_property``.
Where the blank is in the middle of a reversed question, each choice is the rest of the sentence. Not used:
``index`` (not the same in both files), ``foil1`` to ``foil3`` (among the choices), ``token_type`` and
``superordinate_category``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._parts import choice, efficacy, has
from errata.types import Case, Probe

EVALUATION, EDITS = "evaluation", "edits"
PROMPT = "a {} is a kind of"
_SUBJECT, _ANSWER = "<subj>", "<answer>"


def records(document: Any, variant: str) -> Iterator[Any]:
    """Turn columns into rows; under ``edits``, those of one edit into one. Raises Malformed."""
    if isinstance(document, list):
        yield from document
        return
    if not has(document, "subj") or not all(isinstance(column, Mapping) for column in document.values()):
        raise Malformed("expected a table by columns: a mapping of each column's name to its cells by row")
    rows = [{name: column.get(number) for name, column in document.items()} for number in document["subj"]]
    if variant == EVALUATION or "property" not in document:
        yield from rows
        return
    groups: dict[tuple[Any, Any], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["subj"], row["entity"]), []).append(row)
    for group in groups.values():
        yield {**group[0], "questions": group}


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one row, or one edit with its questions, into a case. Raises Skip or Malformed."""
    name = f"taxi:{record.index}"
    request = make_request(
        PROMPT, record.text("subj"), record.text("entity"), record.text("orig_entity"), id=name
    )
    rows = record.records("questions") or ([record] if record.get("property") else [])
    probes = [probe for row in rows for probe in _probes(row)]
    yield Case(name, request, (efficacy(request), *probes))


def _probes(row: Record) -> Iterator[Probe]:
    """Yield probes for a property of the kind, and for the kind with the property."""
    subject, answer = row.text("subj").strip(), row.text("answer_fwd").strip()
    changes = row.get("answer_changed")
    if not isinstance(changes, bool):
        raise Malformed(f"answer_changed: expected true or false, found {changes!r:.60}")
    head, _, tail = row.text("query_fwd").replace(_SUBJECT, subject).partition(_ANSWER)
    if not head.strip() or tail.strip():
        raise Skip(f"query_fwd: the question {row.text('query_fwd')!r} does not end in its answer")
    old = row.text("orig_answer_fwd").strip() if row.get("orig_answer_fwd") is not None else None
    kind = "category" if row.get("property") == "category_membership" else "property"
    kind = kind if changes else f"{kind}_kept"
    yield choice(kind, head.strip(), answer, row.texts("fwd_choices", required=True), old, old)
    head, _, tail = row.text("query_rev").replace(_ANSWER, answer).partition(_SUBJECT)
    if not head.strip():
        row.omissions["reversed questions that begin with their blank"] += 1
        return
    labels = [f"{label}{tail}" for label in row.texts("rev_choices", required=True)]
    right = f"{subject}{tail}".strip()
    yield choice("inverse_property", head.strip(), right, labels, None if changes else right)


def fits(value: Any) -> bool:
    """Whether a row, or a table by columns, is of either file."""
    return has(value, "subj", "entity", "orig_entity", "edit_type")


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the file of questions by their properties."""
    return (EVALUATION,) if any(has(record, "property") for record in records) else (EDITS,)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count edits, and the questions by kind."""
    kinds = Counter(probe.kind for case in cases for probe in case.probes[1:])
    edits = {(case.request.subject, case.request.target) for case in cases}
    return {"edits": len(edits), "questions": dict(sorted(kinds.items()))}


DATASET = Dataset(
    name="taxi",
    title="TAXI",
    paper="TAXI: Evaluating Categorical Knowledge Editing for Language Models, Findings of ACL 2024, arXiv 2404.15004",
    licence="MIT (repository)",
    home="GitHub derekpowell/taxi, datasets",
    fits=fits,
    cases=cases,
    variants=(EVALUATION, EDITS),
    records=records,
    facts=facts,
    files={EVALUATION: "edits-evaluation.json", EDITS: "edits.json"},
    variants_of=variants_of,
)
