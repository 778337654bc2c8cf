"""zsRE in the flat form of MEND and ROME, under two conventions that must not be mixed.

``true``: the target is the gold answer (ROME, MEMIT and later papers); a model may know it already, so the unedited
score is not zero. ``alt``: the target is a wrong answer (MEND, EasyEdit), which replaces the gold answers.

The locality probe is an unrelated question of Natural Questions: ``loc`` with a question mark. Both conventions have
its gold answer; under ``alt``, papers instead compare the outputs before and after, right or wrong.

Files for training (EasyEdit's ``zsre_mend_train_10000.json``) have no gold answers, so only ``alt`` applies to them.
Not used: ``pred`` (another model's answer) and ``cond`` (a text for training that model).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._parts import (
    PORTABILITY_FIELDS,
    efficacy,
    has,
    is_answer,
    locality_probe,
    name_of,
    rival_to,
    spellings,
)
from errata.types import Case, Probe, Request

TRUE, ALT = "true", "alt"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case under a convention. Raises Skip, Malformed."""
    name = f"zsre:{name_of(record, 'case_id')}"
    gold = spellings("", record.texts("answers", required=has(record.value, "answers")))
    if variant == TRUE:
        if not gold:
            raise Skip("the record has no gold answer, only the wrong one of zsre/alt")
        target, right, before = gold[0], gold, ()
    else:
        target, right, before = record.text("alt"), spellings(record.text("alt")), gold
        if is_answer(target, gold):
            raise Skip(f"the alternative answer {target.strip()!r} is among the gold ones")
    request = make_request(
        record.text("src"), record.text("subject"), target, before[0] if before else None, id=name
    )
    probes = (
        efficacy(request, right, before),
        *rephrasing_probes(request, record.texts("rephrase"), right, before),
        loc_probe(record),
    )
    yield Case(name, request, probes)


def rephrasing_probes(
    request: Request, prompts: tuple[str, ...], right: tuple[str, ...], before: tuple[str, ...]
) -> Iterator[Probe]:
    """Yield paraphrase probes; the old target is the rival."""
    for prompt in prompts:
        yield Probe("paraphrase", prompt, right, before, rival_to(right, request.target_old, before))


def loc_probe(record: Record) -> Probe:
    """Build the locality probe from ``loc``, an unrelated question. Raises Malformed."""
    return locality_probe("locality", _question(record.text("loc")), _texts(record, "loc_ans"))


def _question(text: str) -> str:
    return text if text.rstrip().endswith("?") else f"{text.rstrip()}?"


def _texts(record: Record, field: str) -> tuple[str, ...]:
    texts = spellings("", record.texts(field, required=True))
    if not texts:
        raise Malformed(f"{field}: expected an answer, found none")
    return texts


def fits(value: Any) -> bool:
    """Whether a record is flat zsRE, without the later portability questions.

    Files for training come without ``answers``, which leaves the convention ``alt``.
    """
    own = has(value, "src", "subject", "rephrase", "loc", "loc_ans")
    return (
        own
        and ("answers" in value or "alt" in value)
        and not any(name in value for name in PORTABILITY_FIELDS)
    )


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Return ``alt`` where no record has a gold answer; else either convention is possible."""
    return () if any(has(record, "answers") for record in records) else (ALT,)


DATASET = Dataset(
    name="zsre",
    title="zsRE, flat form",
    paper="Levy et al., CoNLL 2017, arXiv 1706.04115; locality of Mitchell et al., Fast Model Editing at Scale, "
    "ICLR 2022, arXiv 2110.11309; flat form of Meng et al., NeurIPS 2022, arXiv 2202.05262",
    licence="not stated for the data; the authors' code is MIT",
    home="https://rome.baulab.info/data/dsets/zsre_mend_eval.json",
    fits=fits,
    cases=cases,
    variants=(TRUE, ALT),
    files={"": "zsre_mend_eval.json"},
    variants_of=variants_of,
    urls={"": "https://rome.baulab.info/data/dsets/zsre_mend_eval.json"},
)
