"""20Q and PEP3k: short statements judged ``True`` or ``False``, as edited by MEMIT_CSK.

A row is a statement ``prompt`` with its ``label`` (1 or ``True`` if plausible) and its parts ``subject``,
``verb`` and ``object``; the prompt put to a model ends in a colon. An edit flips the judgement: the label is
the target, the other one the old answer. Rows of the probe set add statements the flip must reach
(``affected_*``, judged like the edited one; ``affected_reasoning`` are true in themselves) and statements it
must not (``unaffected_neighborhood_*``).

What the unedited model says to the latter is not in the file, and the authors compare with whatever that
was. So each is asked twice, once with either judgement as the answer to be kept: of the two, the one the
unedited model gives counts, and it counts when it is still given. Left aside: ``neg``,
``prompt_polarity_grounded`` and the predictions of the authors' models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, request
from errata.data.sets._parts import has, name_of
from errata.types import Case, Probe

JUDGEMENTS = ("True", "False")
PLURAL = 0.3
"""Share of subjects ending in s between those of the two sets."""
ENOUGH = 10
"""Records that say which set they are of."""

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
    wanted = request(_asked(statement), subject, label, other, id=name)
    probes = [_judged("efficacy", wanted.text, label, (other,))]
    for field, kind in _AFFECTED.items():
        probes += [_judged(kind, _asked(text), label, ()) for text in record.texts(field)]
    probes += [_judged("logical", _asked(text), "True", ()) for text in record.texts("affected_reasoning")]
    for field, kind in _UNAFFECTED.items():
        for text in record.texts(field):
            probes += [_judged(kind, _asked(text), answer, (answer,)) for answer in JUDGEMENTS]
    yield Case(f"commonsense:{name}", wanted, tuple(probes))


def _judgement(record: Record) -> str:
    found = record.get("label")
    by_number = {1: "True", 0: "False"}
    label = (
        found.strip() if isinstance(found, str) else by_number.get(found) if isinstance(found, int) else None
    )
    if label not in JUDGEMENTS:
        raise Malformed(f"label: expected 1, 0, True or False, found {found!r:.60}")
    return label


def _other(label: str) -> str:
    return JUDGEMENTS[1 - JUDGEMENTS.index(label)]


def _asked(statement: str) -> str:
    return f"{statement.strip()}:"


def _judged(kind: str, prompt: str, answer: str, before: tuple[str, ...]) -> Probe:
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
    """Tell the sets by how they speak: 20Q of kinds in the plural (people, magnets), PEP3k of one (a hand, a dog).

    Half of 20Q's subjects end in s, one in seven of PEP3k's at most; a few records do not say.
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
