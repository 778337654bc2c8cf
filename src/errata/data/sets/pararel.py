"""ParaRel: relations in several wordings, to test whether a model answers paraphrases consistently.

There are three kinds of records. Patterns, one file per relation, named after it: ``pattern`` with ``[X]`` for the
subject and ``[Y]`` for the object. Relations, as in CaliNet: ``relation``, ``template`` (one wording) and
``wrong`` (statements that do not follow; not paraphrases, so not used). Facts:
``sub_label`` and ``obj_label``.

Only a fact together with wordings of its relation makes a case: a record with ``relation``, ``templates``,
``sub_label`` and ``obj_label``, as :func:`facts_with_wordings` makes them. Wordings alone are a source of paraphrases,
see :func:`paraphrases`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._files import read_records
from errata.data.sets._parts import efficacy, has
from errata.errors import DataError
from errata.types import Case, Probe

SUBJECT, OBJECT = "[X]", "[Y]"


def to_prompt(wording: str) -> str | None:
    """Return a wording up to its object as a prompt with ``{}``; None where that prompt does not determine the object.

    That is so where the object comes before the subject, or where more words follow it, as in ``[X] and [Y] are
    twin cities``.
    """
    head, mark, tail = wording.partition(OBJECT)
    if not mark or head.count(SUBJECT) != 1 or re.search(r"\w", tail):
        return None
    return " ".join(head.replace(SUBJECT, "{}").split())


def wordings(path: Path) -> dict[str, tuple[str, ...]]:
    """Return the wordings by relation, with ``[X]`` and ``[Y]``, of a file or a folder of patterns.

    Raises DataError where there is nothing to read, Malformed for a record that holds no wording.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise DataError(
            f"{path} holds no *.jsonl; expected ParaRel's folder of patterns, one file a relation"
        )
    by_relation: dict[str, list[str]] = {}
    for file in files:
        for record in read_records(file):
            relation = record.text("relation") if has(record.value, "relation") else file.stem
            by_relation.setdefault(relation, []).extend(_wordings(record))
    return {relation: tuple(dict.fromkeys(texts)) for relation, texts in by_relation.items()}


def _wordings(record: Record) -> tuple[str, ...]:
    texts = [text for field in ("pattern", "template", "templates") for text in record.texts(field)]
    for text in texts:
        if text.count(SUBJECT) != 1 or text.count(OBJECT) != 1:
            raise Malformed(f"{record.where}: expected one {SUBJECT} and one {OBJECT}, found {text!r:.80}")
    if not texts:
        raise Malformed(f"{record.where}: expected a wording (pattern, template or templates), found none")
    return tuple(text.strip() for text in texts)


def paraphrases(path: Path) -> dict[str, tuple[str, ...]]:
    """Return prompts with ``{}`` by relation; a relation no wording of which ends in its object has none.

    Raises as :func:`wordings`, which also gives the wordings that cannot be asked.
    """
    prompts_by_relation = {
        relation: [to_prompt(text) for text in texts] for relation, texts in wordings(path).items()
    }
    return {
        relation: tuple(dict.fromkeys(prompt for prompt in prompts if prompt))
        for relation, prompts in prompts_by_relation.items()
    }


def facts_with_wordings(patterns: Path, facts: Path) -> Iterator[dict[str, Any]]:
    """Combine the facts of a relation with its wordings; the file of facts is named after the relation.

    Raises DataError where the wordings are not those of the relation the facts are named after, and as
    :func:`wordings`.
    """
    by_relation = wordings(patterns)
    if facts.stem not in by_relation:
        raise DataError(
            f"{patterns} holds wordings of {', '.join(by_relation)}, none of {facts.stem}, as {facts} is named"
        )
    for record in read_records(facts):
        labels = {name: record.text(name) for name in ("sub_label", "obj_label")}
        yield {
            "relation": facts.stem,
            "templates": list(by_relation[facts.stem]),
            **labels,
            "uuid": record.get("uuid"),
        }


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn a fact with its wordings into a case: the first asks the request, the others paraphrase it.

    Raises Skip for wordings without a fact and a fact without wordings, and Malformed.
    """
    fact = has(record.value, "sub_label", "obj_label")
    if not fact:
        _wordings(record)
        raise Skip("wordings without a fact make no case; errata.data.sets.pararel.paraphrases gives them")
    if not has(record.value, "templates"):
        raise Skip(
            "a fact without wordings of its relation makes no case; "
            "errata.data.sets.pararel.facts_with_wordings adds them"
        )
    prompts = tuple(dict.fromkeys(filter(None, map(to_prompt, _wordings(record)))))
    if not prompts:
        raise Skip("no wording of the relation ends in its object")
    subject, target = record.text("sub_label").strip(), record.text("obj_label").strip()
    relation, own = record.text("relation"), record.get("uuid")
    name = f"{relation}/{record.index if own is None else own}"
    request = make_request(prompts[0], subject, target, id=name)
    others = [Probe("paraphrase", prompt.replace("{}", subject), (target,), ()) for prompt in prompts[1:]]
    yield Case(f"pararel:{name}", request, (efficacy(request), *others))


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count facts by relation."""
    relations = Counter(case.id.partition(":")[2].partition("/")[0] for case in cases)
    return {"facts by relation": dict(sorted(relations.items()))}


def fits(value: Any) -> bool:
    """Whether a record is a wording, a relation with wordings, or a fact of LAMA."""
    if has(value, "sub_label", "obj_label"):
        return True
    texts = [value.get(name) for name in ("pattern", "template")] if isinstance(value, Mapping) else []
    return any(isinstance(text, str) and SUBJECT in text and OBJECT in text for text in texts)


DATASET = Dataset(
    name="pararel",
    title="ParaRel",
    paper="Measuring and Improving Consistency in Pretrained Language Models, TACL 2021, arXiv 2102.01017",
    licence="MIT",
    home="GitHub yanaiela/pararel, data/pattern_data/graphs_json and data/trex_lms_vocab; "
    "relations with wrong statements in GitHub dqxiu/CaliNet",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "pararel_relations.jsonl"},
)
