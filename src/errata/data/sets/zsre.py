"""zsRE in the flat form of MEND and ROME, under two conventions that must not be mixed.

``true`` teaches the gold answer (ROME, MEMIT and after): a model that knows it needs no edit, so its unedited score is
not zero. ``alt`` teaches a wrong answer (MEND, EasyEdit): the gold answers are what it must take the place of.
Locality asks an unrelated question of Natural Questions, as ``loc`` with a question mark. Its gold answer is given in
both; under ``alt`` papers ask instead whether the answer stays what it was, right or wrong, which the texts before
and after tell.

Files for training (EasyEdit's ``zsre_mend_train_10000.json``) hold no gold answers: only ``alt`` can be read from them.
``pred`` and ``cond`` are left aside: what another model answered, and a text for training that model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, request
from errata.data.sets._parts import CARRIED, among, efficacy, has, kept, name_of, rival_to, spellings
from errata.types import Case, Probe, Request

TRUE, ALT = "true", "alt"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case under a convention. Raises Skip, Malformed."""
    name = f"zsre:{name_of(record, 'case_id')}"
    gold = spellings("", record.texts("answers", needed=has(record.value, "answers")))
    if variant == TRUE:
        if not gold:
            raise Skip("the record holds no gold answer to teach, only the wrong one of zsre/alt")
        target, right, before = gold[0], gold, ()
    else:
        target, right, before = record.text("alt"), spellings(record.text("alt")), gold
        if among(target, gold):
            raise Skip(f"the alternative answer {target.strip()!r} is among the gold ones")
    wanted = request(
        record.text("src"), record.text("subject"), target, before[0] if before else None, id=name
    )
    probes = (
        efficacy(wanted, right, before),
        *rephrased(wanted, record.texts("rephrase"), right, before),
        unrelated(record),
    )
    yield Case(name, wanted, probes)


def rephrased(
    wanted: Request, prompts: tuple[str, ...], right: tuple[str, ...], before: tuple[str, ...]
) -> Iterator[Probe]:
    """Ask the request's question in other words; known old answers are the rival."""
    for prompt in prompts:
        yield Probe("paraphrase", prompt, right, before, rival_to(right, wanted.target_old, before))


def unrelated(record: Record) -> Probe:
    """Ask a record's unrelated question, ``loc``, which keeps its answer. Raises Malformed."""
    return kept("locality", _question(record.text("loc")), _texts(record, "loc_ans"))


def _question(text: str) -> str:
    return text if text.rstrip().endswith("?") else f"{text.rstrip()}?"


def _texts(record: Record, field: str) -> tuple[str, ...]:
    found = spellings("", record.texts(field, needed=True))
    if not found:
        raise Malformed(f"{field}: expected an answer, found none")
    return found


def fits(value: Any) -> bool:
    """Whether a record is flat zsRE, without the later portability questions.

    Files for training come without ``answers``, which leaves the convention ``alt``.
    """
    own = has(value, "src", "subject", "rephrase", "loc", "loc_ans")
    return own and ("answers" in value or "alt" in value) and not any(name in value for name in CARRIED)


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Leave the convention open, but where no record holds a gold answer."""
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
