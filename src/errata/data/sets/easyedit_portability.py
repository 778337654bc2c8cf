"""EasyEdit's EMNLP 2023 portability sets: one-hop reasoning, inverse relation, subject replacement.

``zsre_mend_eval_portability_gpt4.json`` is also EasyEdit's usual zsRE test set, and WISE's ``zsre_mend_edit.json``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from errata.data._base import Dataset, Record, Skip
from errata.data.sets._counterfact import neighbourhood_probes, nested, rewrite
from errata.data.sets._parts import (
    LOCALITY_FIELDS,
    ZSRE,
    count,
    efficacy,
    has,
    name_of,
    read_request,
    refuse_unchanged,
    spellings,
)
from errata.data.sets.zsre import loc_probe
from errata.types import Case, Probe, Request

KINDS = {"one-hop": "one_hop", "inverse": "inverse", "subject-replace": "alias"}
"""Variants and kinds of probes."""


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case: the edit, its paraphrases and the question its row holds.

    The rows extend CounterFact or zsRE rows; of the latter the edit is to ``alt``, a false answer, as
    EasyEdit has it, and a row whose ``alt`` is a gold answer is skipped. Fields decide which question a row has;
    the variant only names the file. The locality questions of the base row (``loc``, or the neighbours) are probed
    too, so that one file gives both. The fact that a one-hop question was written from (``Recalled Relation``) is
    not used. Raises Skip or Malformed.
    """
    name = f"easyedit_portability:{name_of(record, 'case_id')}"
    request = rewrite(record, name) if nested(record.value) else _zsre_request(record, name)
    probe = efficacy(request, before=record.texts("answers"))
    phrasings = record.texts("paraphrase_prompts") or record.texts("rephrase")
    probes = [probe, *(replace(probe, kind="paraphrase", prompt=text) for text in phrasings)]
    questions = list(portability_probes(record, request, probe.before))
    if not questions:
        raise Skip("the row has no portability question, only the edit itself")
    near = neighbourhood_probes(request, record.texts("neighborhood_prompts"))
    other = (loc_probe(record),) if has(record.value, "loc") else ()
    yield Case(name, request, (*probes, *questions, *near, *other))


def portability_probes(record: Record, request: Request, old: tuple[str, ...]) -> Iterator[Probe]:
    """Yield the row's portability probes; the old answer is known only where they ask for the edited fact itself."""
    if record.get("portability.New Question"):
        right = spellings(record.text("portability.New Answer"))
        yield Probe("one_hop", record.text("portability.New Question").strip(), right, ())
    if has(record.value, "inverse question"):
        yield Probe("inverse", record.text("inverse question").strip(), (request.subject,), ())
    if has(record.value, "alter_subject_question"):
        yield Probe("alias", record.text("alter_subject_question").strip(), (request.target,), old)
    elif has(record.value, "alternative_subject"):
        head, tail = request.template
        prompt = head + record.text("alternative_subject").strip() + tail
        yield Probe("alias", prompt, (request.target,), old)


def _zsre_request(record: Record, name: str) -> Request:
    gold = record.texts("answers", required=True)
    refuse_unchanged(record.text("alt"), gold)
    return read_request(record, ZSRE, gold, name)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count the probes of each set."""
    return {variant: count(cases, kind) for variant, kind in KINDS.items() if count(cases, kind)}


def fits(value: Any) -> bool:
    """Whether a record is an edit with the question of one of the sets."""
    if not (nested(value) or has(value, "src", "alt", "answers")):
        return False
    if any(name in value for name in ("prefix_distraction", *LOCALITY_FIELDS)):
        return False  # EVOKE and the locality sets extend the one-hop rows with questions of their own
    return (
        has(value.get("portability"), "New Question")
        or has(value, "inverse question")
        or has(value, "alternative_subject")
        or has(value, "alter_subject_question")
    )


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the sets by the question that a record holds."""
    if any(has(record, "inverse question") for record in records):
        return ("inverse",)
    fields = ("alternative_subject", "alter_subject_question")
    return ("subject-replace",) if any(has(r, name) for r in records for name in fields) else ("one-hop",)


DATASET = Dataset(
    name="easyedit_portability",
    title="EasyEdit portability (EMNLP 2023)",
    paper="Editing Large Language Models: Problems, Methods, and Opportunities, EMNLP 2023, arXiv 2305.13172",
    licence="MIT (repository)",
    home="GitHub zjunlp/EasyEdit, README, the archive editing-data, folder portability",
    fits=fits,
    cases=cases,
    variants=tuple(KINDS),
    facts=facts,
    variants_of=variants_of,
    files={
        "one-hop": "counterfact_portability_gpt4.json",
        "inverse": "zsre_inverse_relation.json",
        "subject-replace": "counterfact_subject_replace.json",
    },
)
