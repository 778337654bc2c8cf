"""AKEW on MQuAKE-CF: each edit as a structured fact, as a passage, or as triplets extracted from the passage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from errata.data._base import Dataset, Malformed, Record, make_request
from errata.data.sets._parts import efficacy, has, long_answer, name_of
from errata.data.sets.mquake import Rewrite, chain_probes, facts, is_chain, question_probes, rewrites
from errata.types import Case, Probe, Request


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip or Malformed.

    ``structured``: the edit is the fact, as in MQuAKE. ``unstructured``: the target is the passage; probes are
    the passage, the cloze prompt as its paraphrase, and the triplets as sub-questions. ``triplets``: each triplet
    of the passages is an edit. All three variants also probe the edited fact as a question, and the chain.
    All edits of a record are used; AnyEdit's loader takes the first only, appends a question mark to the
    cloze prompt, and takes at most five triplets.
    """
    name = f"akew:{name_of(record, 'case_id')}"
    edits = rewrites(record, name)
    if variant == "unstructured":
        requests, probes = _passages(edits)
    elif variant == "triplets":
        requests = [triplet for edit in edits for triplet in _triplets(edit)]
        probes = [efficacy(triplet) for triplet in requests]
    else:
        requests = [edit.request for edit in edits]
        probes = [efficacy(edit.request, edit.right, edit.before) for edit in edits]
    probes += question_probes(edits) + chain_probes(record, edits)
    yield Case(name, requests[0], tuple(probes), tuple(requests[1:]))


def _passages(edits: list[Rewrite]) -> tuple[list[Request], list[Probe]]:
    requests, longs, parts = [], [], []
    for edit in edits:
        passage, fact = edit.source.text("fact_new_uns"), edit.request
        request = make_request(edit.question, fact.subject, passage, fact.target_old, id=fact.id)
        requests.append(request)
        longs.append(long_answer("long", request.text, passage))
        parts.append(long_answer("long_paraphrase", fact.text, passage))
        parts += [Probe("sub_question", t.text, (t.target,), ()) for t in _triplets(edit)]
    return requests, longs + parts


def _triplets(edit: Rewrite) -> list[Request]:
    """Read the triplets of a passage; the fact's id gets their number. Raises Skip or Malformed."""
    number, _, relation = (edit.request.id or "").partition(" ")
    triplets = []
    for i, item in enumerate(edit.source.records("unsfact_triplets_GPT", required=True), 1):
        triplet = make_request(item.text("prompt"), item.text("subject"), item.text("target"))
        triplets.append(replace(triplet, id=f"{number}.{i} {relation}".strip()))
    if not triplets:
        raise Malformed("unsfact_triplets_GPT: expected at least one triplet, found none")
    return triplets


def fits(value: Any) -> bool:
    """Whether a record is a chain of facts with passages written for them."""
    return is_chain(value) and has(value["requested_rewrite"][0], "fact_new_uns", "unsfact_triplets_GPT")


DATASET = Dataset(
    name="akew",
    title="AKEW (MQuAKE-CF part)",
    paper="AKEW: Assessing Knowledge Editing in the Wild, EMNLP 2024, arXiv 2402.18909",
    licence="not stated",
    home="GitHub jianghoucheng/AnyEdit, data/AKEW/MQuAKE-CF.json",
    fits=fits,
    cases=cases,
    variants=("structured", "unstructured", "triplets"),
    facts=facts,
    files={"": "akew_mquake_cf.json"},
)
