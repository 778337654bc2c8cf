"""zsRE in the flat form of MEND and ROME, under two conventions that must not be mixed.

``true`` teaches the gold answer (ROME, MEMIT and after): a model that knows it needs no edit, so its unedited score is
not zero. ``alt`` teaches a wrong answer (MEND, EasyEdit): the gold answers are what it must take the place of.
Locality asks an unrelated question of Natural Questions, as ``loc`` with a question mark. Its gold answer is given in
both; under ``alt`` papers ask instead whether the answer stays what it was, right or wrong, which the texts before
and after tell.

``pred`` and ``cond`` are left aside: what another model answered, and a text for training that model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, request
from errata.data.sets._parts import CARRIED, efficacy, has, kept, name_of, spellings
from errata.types import Case, Probe, Request

TRUE, ALT = "true", "alt"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case under a convention. Raises Skip, Malformed."""
    name = f"zsre:{name_of(record, 'case_id')}"
    gold = spellings("", record.texts("answers", needed=True))
    if variant == TRUE:
        target, right, before = gold[0], gold, ()
    else:
        target, right, before = record.text("alt"), spellings(record.text("alt")), gold
        if target.strip() in gold:
            raise Skip(f"the alternative answer {target.strip()!r} is among the gold ones")
    wanted = request(
        record.text("src"), record.text("subject"), target, before[0] if before else None, id=name
    )
    probes = (
        efficacy(wanted, right, before),
        *rephrased(wanted, record.texts("rephrase"), right, before),
        kept("locality", _question(record.text("loc")), _texts(record, "loc_ans")),
    )
    yield Case(name, wanted, probes)


def rephrased(
    wanted: Request, prompts: tuple[str, ...], right: tuple[str, ...], before: tuple[str, ...]
) -> Iterator[Probe]:
    """Ask the request's question in other words; known old answers are the rival."""
    for prompt in prompts:
        yield Probe("paraphrase", prompt, right, before, wanted.target_old)


def _question(text: str) -> str:
    return text if text.rstrip().endswith("?") else f"{text.rstrip()}?"


def _texts(record: Record, field: str) -> tuple[str, ...]:
    found = spellings("", record.texts(field, needed=True))
    if not found:
        raise Malformed(f"{field}: expected an answer, found none")
    return found


def fits(value: Any) -> bool:
    """Whether a record is flat zsRE, without the later portability questions."""
    own = has(value, "src", "subject", "answers", "rephrase", "loc", "loc_ans")
    return own and not any(name in value for name in CARRIED)


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
    urls={"": "https://rome.baulab.info/data/dsets/zsre_mend_eval.json"},
)
