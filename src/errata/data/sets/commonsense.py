"""20Q and PEP3k: short statements judged ``True`` or ``False``, as edited by MEMIT_CSK.

A row is a statement ``prompt`` with its ``label`` (1 or ``True`` if plausible) and its parts ``subject``,
``verb`` and ``object``; a colon is appended to each prompt. An edit flips the judgement: the label is the
target, the other label the old answer. Rows of the probe set add statements whose label must flip too
(``affected_*``; those of ``affected_reasoning`` must become ``True``) and statements whose judgement must not
change (``unaffected_neighborhood_*``).

For the latter the file does not have the unedited model's judgement, which the authors compare with. So there
are two probes for each, one for either judgement as the answer to keep: the one that the unedited model gives
counts, and is right if the edited model still gives it. Not used: ``neg``, ``prompt_polarity_grounded`` and the
predictions of the authors' models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._parts import has, name_of
from errata.types import Case, Probe

JUDGEMENTS = ("True", "False")
PLURAL = 0.3
"""Share of subjects ending in s between those of the two sets."""
ENOUGH = 10
"""Minimum number of records needed to tell the two sets apart."""

_AFFECTED = {
    "affected_paraphrase": "paraphrase",
    "affected_neighborhood_subject": "affected_subject",
    "affected_neighborhood_verb": "affected_verb",
    "affected_neighborhood_object": "affected_object",
}
_UNAFFECTED = {
    "unaffected_neighborhood_subject": "neighbourhood",
    "unaffected_neighborhood_object": "same_subject",
}


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; the variant names the set. Raises Skip or Malformed."""
    statement, label = record.text("prompt"), _judgement(record)
    if not record.texts("subject"):
        raise Skip(
            "its parts are not annotated; read the files of the folder svo_annotated, or the probe set"
        )
    name = f"{variant}/{name_of(record)}"
    subject, other = record.text("subject"), _other(label)
    word = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", statement)
    if word:  # not the same letters inside another word
        statement = statement[: word.start()] + "{}" + statement[word.end() :]
    request = make_request(_prompt(statement), subject, label, other, id=name)
    probes = [_probe("efficacy", request.text, label, (other,))]
    for field, kind in _AFFECTED.items():
        probes += [_probe(kind, _prompt(text), label, ()) for text in record.texts(field)]
    probes += [_probe("logical", _prompt(text), "True", ()) for text in record.texts("affected_reasoning")]
    for field, kind in _UNAFFECTED.items():
        for text in record.texts(field):
            probes += [_probe(kind, _prompt(text), answer, (answer,)) for answer in JUDGEMENTS]
    yield Case(f"commonsense:{name}", request, tuple(probes))


def _judgement(record: Record) -> str:
    value = record.get("label")
    by_number = {1: "True", 0: "False"}
    label = (
        value.strip() if isinstance(value, str) else by_number.get(value) if isinstance(value, int) else None
    )
    if label not in JUDGEMENTS:
        raise Malformed(f"label: expected 1, 0, True or False, found {value!r:.60}")
    return label


def _other(label: str) -> str:
    return JUDGEMENTS[1 - JUDGEMENTS.index(label)]


def _prompt(statement: str) -> str:
    return f"{statement.strip()}:"


def _probe(kind: str, prompt: str, answer: str, before: tuple[str, ...]) -> Probe:
    return Probe(kind, prompt, (answer,), before, _other(answer), form="choice", choices=JUDGEMENTS)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count rows by label."""
    return {"rows by label": dict(sorted(Counter(case.request.target for case in cases).items()))}


def fits(value: Any) -> bool:
    """Whether a record is a labelled statement with its parts, or a labelled statement alone."""
    return has(value, "prompt", "label", "subject", "verb", "object") or (
        has(value, "prompt", "label") and len(value) == 2
    )


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the sets apart by their subjects: plural in 20Q (people, magnets), singular in PEP3k (a hand, a dog).

    Half of 20Q's subjects end in s, at most one in seven of PEP3k's. Empty for too few records.
    """
    subjects = [str(record["subject"]).strip() for record in records if has(record, "subject")]
    if len(subjects) < ENOUGH:
        return ()
    plural = sum(subject.lower().endswith("s") for subject in subjects) / len(subjects)
    return ("20q",) if plural > PLURAL else ("pep3k",)


DATASET = Dataset(
    name="commonsense",
    title="20Q and PEP3k, edit and probe sets",
    paper="Editing Common Sense in Transformers, EMNLP 2023, arXiv 2305.14956",
    licence="MIT (repository)",
    home="GitHub anshitag/memit_csk, data/20q and data/pep3k: probe_set.json, svo_annotated/edit_set.json",
    fits=fits,
    cases=cases,
    variants=("20q", "pep3k"),
    facts=facts,
    files={"20q": "20q/probe_set.json", "pep3k": "pep3k/probe_set.json"},
    variants_of=variants_of,
)
