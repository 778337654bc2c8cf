"""RippleEdits: what follows from an edit and what must not, in six criteria with conditions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, request
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

KEPT = ("relation_specificity", "forgetfulness")
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

    Where one query has several answers, the paper's code wants every one named: such a query becomes one
    probe for each. Only in an OR over several queries, where groups cannot say that, is any of them enough.
    A query without answers is passed by whatever the model says in the authors' check, which asks whether every
    answer of an empty list was given. Nothing is measured by it, so here a test that such a query decides is left
    out, and counted by the check under its criterion; :func:`authors_share` puts them back into a share.

    A query of the form ``..., which is not X, is`` asks for what stays beside the edit's target X: it belongs to
    Preservation (``Forgetfulness``) wherever it stands, as files filtered by the authors' code have some of them
    under ``Compositionality_II``.
    """
    edit = Record(record.get("edit"), f"{record.where}, edit", record.index)
    name = f"ripple_edits:{name_of(record)}"
    wanted = _request(edit, _target_labels(record), name)
    probes = [efficacy(wanted, _target_aliases(record, wanted))]
    for criterion, kind in KINDS.items():
        for number, test in enumerate(record.records(criterion), 1):
            probes += _test(test, _kind(test, kind), f"{criterion} {number}", wanted)
    yield Case(name, wanted, tuple(probes))


def _kind(test: Record, kind: str) -> str:
    """Return the kind that a test is of: Preservation where every query excepts the edit's target."""
    prompts = [_prompt(query) for query in test.records("test_queries")]
    return "forgetfulness" if prompts and all(map(PRESERVATION.search, prompts)) else kind


def authors_share(share: float, tests: int, unanswerable: int) -> float:
    """Return the share of passed tests as the authors' code counts it, tests without an answer among the passed.

    ``share``: of the ``tests`` that were asked; ``unanswerable``: how many the check says were left out. NaN
    without any test.
    """
    counted = tests + unanswerable
    return (share * tests + unanswerable) / counted if counted else float("nan")


def _request(edit: Record, labels: Sequence[str], name: str) -> Request:
    """Read subject, target and old target off the sentences. Raises Skip where they cannot be told.

    A sentence may read in several ways, when subject or target hold a verb themselves: a label decides, or
    the original sentence, which differs in the target alone.
    """
    sentence, before = _sentence(edit.text("prompt")), None
    halves = _halves(sentence, edit.get("relation"))
    named = [half for half in halves if half[1] in labels]
    if edit.get("target_label") is not None and not named:
        raise Skip(f"the prompt {sentence!r} does not end in its target {edit.get('target_label')!r}")
    given = edit.get("subject_label")
    readings = [
        (stem, target, subject)
        for stem, target in named or halves
        if (subject := given if isinstance(given, str) and given in stem else _subject(stem))
    ]
    if edit.get("original_fact") is not None:
        before = _sentence(Record(edit.get("original_fact"), edit.where, edit.index).text("prompt"))
        readings = [reading for reading in readings if f"{before} ".startswith(f"{reading[0]} ")]
    if len(readings) != 1:
        beside = "" if before is None else f" beside the original fact {before!r}"
        found = "several ways of reading them" if readings else "none of the dataset's sentences"
        raise Skip(f"subject and target cannot be told in the prompt {sentence!r}{beside}: {found}")
    stem, target, subject = readings[0]
    old = None if before is None else before[len(stem) + 1 :]  # empty where the old object has no label
    if old == target:
        raise Skip(f"the edit changes nothing: the answer to {stem!r} is {target!r} before and after")
    return request(stem, subject, target, old, name)


def _sentence(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


def _halves(sentence: str, relation: Any) -> list[tuple[str, str]]:
    """Cut a sentence after each of its verbs, into prompt and target. Raises Skip where it ends in one."""
    verbs = VERBS.get(str(relation), ("is", "are"))
    ends = [found.end() for verb in verbs for found in re.finditer(rf"(?<= ){verb}(?= )", sentence)]
    if not ends or sentence.endswith(tuple(f" {verb}" for verb in verbs)):
        raise Skip(f"the prompt {sentence!r} does not end in a target: nothing follows its verb")
    return [(sentence[:end], sentence[end:].strip()) for end in sorted(ends)]


def _subject(stem: str) -> str | None:
    return next((found["s"] for frame in FRAMES if (found := frame.match(stem))), None)


def _queries(record: Record) -> Iterator[Record]:
    for criterion in KINDS:
        for test in record.records(criterion):
            yield from test.records("test_queries")


def _target_labels(record: Record) -> list[str]:
    """Return labels of the edit's target: the one given, else those of queries it is the answer to."""
    given = record.get("edit.target_label")
    if isinstance(given, str):
        return [given.strip()]
    return [names[0] for names in _names_of(record, record.get("edit.target_id"))]


def _target_aliases(record: Record, wanted: Request) -> tuple[str, ...]:
    for names in _names_of(record, record.get("edit.target_id")):
        if names[0] == wanted.target:
            return names[1:]
    return ()


def _names_of(record: Record, target: Any) -> Iterator[tuple[str, ...]]:
    """Find answers that stand for an entity: in a query of one hop, answers and target ids run side by side."""
    for query in _queries(record) if target is not None else ():
        ids, answers = query.get("target_ids"), _answers(query)
        if query.get("query_type") == "regular" and isinstance(ids, list) and len(ids) == len(answers):
            yield from (names for own, names in zip(ids, answers, strict=True) if own == target and names)


def _answers(query: Record) -> list[tuple[str, ...]]:
    """Read the answers of a query, each with its aliases; single letters are left out, as the paper does."""
    found = []
    for answer in query.records("answers"):
        value = answer.get("value")
        names = spellings("" if value is None else str(value), answer.texts("aliases"))
        found.append(tuple(name for name in names if len(name) > 1 or name.isdigit()))
    return found


def _test(test: Record, kind: str, group: str, wanted: Request) -> list[Probe]:
    condition = test.get("test_condition")
    if condition not in ("OR", "AND"):
        raise Malformed(f"{test.where}: test_condition: expected OR or AND, found {condition!r}")
    asked = [(_prompt(q), _answers(q)) for q in test.records("test_queries", needed=True)]
    conditions = [(_prompt(q), _answers(q)) for q in test.records("condition_queries")]
    if condition == "OR":
        able = [(prompt, answers) for prompt, answers in asked if answers and all(answers)]
        if 0 < len(able) < len(asked):
            test.aside["queries without an answer, beside others"] += len(asked) - len(able)
        asked = able
    if not asked or not all(answers and all(answers) for _, answers in asked + conditions):
        criterion = next(name for name, own in KINDS.items() if own == kind)
        test.aside[f"{criterion} tests without an answer, which the authors' check passes"] += 1
        return []
    if condition == "OR" and len(asked) > 1:
        asked = [(prompt, [spellings("", sum(answers, ()))]) for prompt, answers in asked]
    need = "any" if condition == "OR" and len(asked) > 1 else "all"
    before = _before(kind, wanted)
    probes = [
        Probe(kind, prompt, names, names if kind in KEPT else before, group=group, need=need)
        for prompt, answers in asked
        for names in answers
    ]
    return probes + [
        Probe("condition", prompt, names, names, group=group, need=need)
        for prompt, answers in conditions
        for names in answers
    ]


def _before(kind: str, wanted: Request) -> tuple[str, ...]:
    """Of the old answers only that to the edit's own question is known, which another name asks as well."""
    return (wanted.target_old,) if kind == "subject_aliasing" and wanted.target_old else ()


def _prompt(query: Record) -> str:
    """Return what a query asks; two-hop queries of some copies carry it as ``phrase`` only."""
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
    """Tell recent facts by their having no original; popular and random subjects only differ by the file's name."""
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
