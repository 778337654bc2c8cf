"""RippleEdits: what an edit implies and what it must not change, in six criteria with conditions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._parts import count, efficacy, has, name_of, spellings
from errata.types import Case, Probe, Request

KINDS = {
    "Relation_Specificity": "relation_specificity",
    "Logical_Generalization": "logical_generalization",
    "Subject_Aliasing": "subject_aliasing",
    "Compositionality_I": "compositionality_1",
    "Compositionality_II": "compositionality_2",
    "Forgetfulness": "forgetfulness",
}
"""Criteria and kinds of probes; the paper calls the last one Preservation."""

UNCHANGED_KINDS = ("relation_specificity", "forgetfulness")
"""Kinds whose answers the edit must leave as they were."""

PRESERVATION = re.compile(r", which is not .+, (?:is|are)$")
"""How a query of Preservation ends: it excepts the edit's target."""

FRAMES = tuple(
    re.compile(pattern)
    for pattern in (
        r"^(?P<s>.+) (?:follows|is followed by)$",
        r"^The number of children (?P<s>.+) has is$",
        r"^The name of the award (?P<s>.+) won is$",
        r"^The name of the (?:position held by|currency in"
        r"|anthem that is most likely to be performed in) (?P<s>.+) is$",
        r"^The name of the \w+(?: \w+)? which (?P<s>.+) "
        r"(?:is associated with|is a member of|plays in|is part of|is the capital of) is$",
        r"^The (?:names? of the )?(?!names? )(?:(?:place|date) of (?:birth|death|burial)|country of citizenship"
        r"|field of work|head of (?:government|state)|[a-z]+(?: [a-z]+)?) of (?P<s>.+) (?:is|are)$",
    )
)
"""The few sentences that the dataset's relations are put in; ``s`` is the subject."""

VERBS = {"FOLLOWS": ("follows",), "FOLLOWED_BY": ("is followed by",)}
"""What the sentence of a relation has between subject and object; all others have ``is`` or ``are``."""


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip or Malformed.

    Labels of subject and target are not in the file, only in the sentence ``edit.prompt``; a copy of the
    dataset with ``subject_label`` and ``target_label`` is read by these. Each test is a group: ``need`` is
    ``all`` for AND, ``any`` for OR, and its condition queries join it as kind ``condition``.

    Where one query has several answers, the paper's code requires all of them: such a query becomes one probe
    per answer. Only in an OR over several queries, which groups cannot express, is any answer enough.
    A query without answers always passes in the authors' code, which tests whether every answer of an empty list
    was given. It measures nothing, so here a test that depends on such a query is left out, and the check counts it
    under its criterion; :func:`authors_share` includes those tests again.

    A query of the form ``..., which is not X, is`` asks for the objects other than the edit's target X: it belongs to
    Preservation (``Forgetfulness``), also where files filtered by the authors' code have it under
    ``Compositionality_II``.
    """
    edit = Record(record.get("edit"), f"{record.where}, edit", record.index)
    name = f"ripple_edits:{name_of(record)}"
    request = _request(edit, _target_labels(record), name)
    probes = [efficacy(request, _target_aliases(record, request))]
    for criterion, kind in KINDS.items():
        for number, test in enumerate(record.records(criterion), 1):
            probes += _test(test, _kind(test, kind), f"{criterion} {number}", request)
    yield Case(name, request, tuple(probes))


def _kind(test: Record, kind: str) -> str:
    """Return the kind that a test is of: Preservation where every query excepts the edit's target."""
    prompts = [_prompt(query) for query in test.records("test_queries")]
    return "forgetfulness" if prompts and all(map(PRESERVATION.search, prompts)) else kind


def authors_share(share: float, tests: int, unanswerable: int) -> float:
    """Return the share of passed tests as the authors' code counts it, with tests without an answer as passed.

    ``share``: of the ``tests`` that were run; ``unanswerable``: how many the check counted as left out. NaN
    without any test.
    """
    total = tests + unanswerable
    return (share * tests + unanswerable) / total if total else float("nan")


def _request(edit: Record, labels: Sequence[str], name: str) -> Request:
    """Parse subject, target and old target from the sentences. Raises Skip where the parse is not unique.

    A sentence has several parses when subject or target contain a verb: a label decides, or the original
    sentence, which differs in the target alone.
    """
    sentence, before = _sentence(edit.text("prompt")), None
    halves = _halves(sentence, edit.get("relation"))
    with_label = [half for half in halves if half[1] in labels]
    if edit.get("target_label") is not None and not with_label:
        raise Skip(f"the prompt {sentence!r} does not end in its target {edit.get('target_label')!r}")
    label = edit.get("subject_label")
    readings = [
        (stem, target, subject)
        for stem, target in with_label or halves
        if (subject := label if isinstance(label, str) and label in stem else _subject(stem))
    ]
    if edit.get("original_fact") is not None:
        before = _sentence(Record(edit.get("original_fact"), edit.where, edit.index).text("prompt"))
        readings = [reading for reading in readings if f"{before} ".startswith(f"{reading[0]} ")]
    if len(readings) != 1:
        context = "" if before is None else f" with the original fact {before!r}"
        reason = "several parses" if readings else "none of the dataset's sentence patterns matches"
        raise Skip(f"cannot parse subject and target of the prompt {sentence!r}{context}: {reason}")
    stem, target, subject = readings[0]
    old = None if before is None else before[len(stem) + 1 :]  # empty where the old object has no label
    if old == target:
        raise Skip(f"the edit changes nothing: the answer to {stem!r} is {target!r} before and after")
    return make_request(stem, subject, target, old, name)


def _sentence(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


def _halves(sentence: str, relation: Any) -> list[tuple[str, str]]:
    """Cut a sentence after each of its verbs, into prompt and target. Raises Skip where it ends in one."""
    verbs = VERBS.get(str(relation), ("is", "are"))
    ends = [match.end() for verb in verbs for match in re.finditer(rf"(?<= ){verb}(?= )", sentence)]
    if not ends or sentence.endswith(tuple(f" {verb}" for verb in verbs)):
        raise Skip(f"the prompt {sentence!r} does not end in a target: nothing follows its verb")
    return [(sentence[:end], sentence[end:].strip()) for end in sorted(ends)]


def _subject(stem: str) -> str | None:
    return next((match["s"] for frame in FRAMES if (match := frame.match(stem))), None)


def _queries(record: Record) -> Iterator[Record]:
    for criterion in KINDS:
        for test in record.records(criterion):
            yield from test.records("test_queries")


def _target_labels(record: Record) -> list[str]:
    """Return labels of the edit's target: its own, else those from queries that it answers."""
    label = record.get("edit.target_label")
    if isinstance(label, str):
        return [label.strip()]
    return [names[0] for names in _names_of(record, record.get("edit.target_id"))]


def _target_aliases(record: Record, request: Request) -> tuple[str, ...]:
    for names in _names_of(record, record.get("edit.target_id")):
        if names[0] == request.target:
            return names[1:]
    return ()


def _names_of(record: Record, target: Any) -> Iterator[tuple[str, ...]]:
    """Find the names of an entity: one-hop queries have parallel lists of answers and target ids."""
    for query in _queries(record) if target is not None else ():
        ids, answers = query.get("target_ids"), _answers(query)
        if query.get("query_type") == "regular" and isinstance(ids, list) and len(ids) == len(answers):
            yield from (names for own, names in zip(ids, answers, strict=True) if own == target and names)


def _answers(query: Record) -> list[tuple[str, ...]]:
    """Read the answers of a query, each with its aliases; single letters are left out, as the paper does."""
    answers = []
    for answer in query.records("answers"):
        value = answer.get("value")
        names = spellings("" if value is None else str(value), answer.texts("aliases"))
        answers.append(tuple(name for name in names if len(name) > 1 or name.isdigit()))
    return answers


def _test(test: Record, kind: str, group: str, request: Request) -> list[Probe]:
    condition = test.get("test_condition")
    if condition not in ("OR", "AND"):
        raise Malformed(f"{test.where}: test_condition: expected OR or AND, found {condition!r}")
    queries = [(_prompt(q), _answers(q)) for q in test.records("test_queries", required=True)]
    conditions = [(_prompt(q), _answers(q)) for q in test.records("condition_queries")]
    if condition == "OR":
        able = [(prompt, answers) for prompt, answers in queries if answers and all(answers)]
        if 0 < len(able) < len(queries):
            test.omissions["queries without an answer, beside others"] += len(queries) - len(able)
        queries = able
    if not queries or not all(answers and all(answers) for _, answers in queries + conditions):
        criterion = next(name for name, own in KINDS.items() if own == kind)
        test.omissions[f"{criterion} tests without an answer, which the authors' check passes"] += 1
        return []
    if condition == "OR" and len(queries) > 1:
        queries = [(prompt, [spellings("", sum(answers, ()))]) for prompt, answers in queries]
    need = "any" if condition == "OR" and len(queries) > 1 else "all"
    before = _before(kind, request)
    probes = [
        Probe(kind, prompt, names, names if kind in UNCHANGED_KINDS else before, group=group, need=need)
        for prompt, answers in queries
        for names in answers
    ]
    return probes + [
        Probe("condition", prompt, names, names, group=group, need=need)
        for prompt, answers in conditions
        for names in answers
    ]


def _before(kind: str, request: Request) -> tuple[str, ...]:
    """Return the answers before the edit: known only for the edit's own question and for it under an alias."""
    return (request.target_old,) if kind == "subject_aliasing" and request.target_old else ()


def _prompt(query: Record) -> str:
    """Return the prompt of a query; some copies have that of two-hop queries only as ``phrase``."""
    return query.text("prompt" if query.get("prompt") else "phrase").strip()


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count tests and probes by criterion, and conditions."""
    tests: Counter[str] = Counter()
    for case in cases:
        tests.update(Counter(kind for kind, _ in {(p.kind, p.group) for p in case.probes if p.group}))
    return {
        "tests": {kind: tests[kind] for kind in KINDS.values()},
        "probes": {kind: count(cases, kind) for kind in KINDS.values()},
        "conditions": count(cases, "condition"),
        "requests without old target": sum(case.request.target_old is None for case in cases),
    }


def fits(value: Any) -> bool:
    """Whether a record is an edit with criteria; not every file has all six."""
    return has(value, "edit", "Relation_Specificity", "Subject_Aliasing") and has(value["edit"], "prompt")


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Recognise recent facts, which have no original; popular and random differ in file name only."""
    edits = [record["edit"] for record in records if has(record, "edit")]
    recent = not any(has(edit, "original_fact") for edit in edits)
    return ("recent",) if recent else ("popular", "random")


DATASET = Dataset(
    name="ripple_edits",
    title="RippleEdits",
    paper="Evaluating the Ripple Effects of Knowledge Editing in Language Models, TACL 2024, arXiv 2307.12976",
    licence="MIT",
    home="GitHub edenbiran/RippleEdits, data/benchmark (files of Git LFS)",
    fits=fits,
    cases=cases,
    variants=("popular", "random", "recent"),
    facts=facts,
    files={"popular": "popular.json", "random": "random.json", "recent": "recent.json"},
    variants_of=variants_of,
)
