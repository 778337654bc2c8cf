"""PEAK: a new answer is added to a question with several answers; the existing answers must stay.

A record is in CounterFact's nested form, with ``postive_list`` (right answers, which stay right), ``negtive_list``
(wrong ones), ``para_add_prompts`` (the request in other words) and ``neighborhood_prompts``, pairs of a prompt and
its answer, which is one of the right ones asked from the other side. The spellings are the authors'.

``target_true`` is one of the right answers, so it is no old answer that the new one takes the place of, and no
rival. ``right_answer`` asks for each right answer against a wrong one, which must stay less probable; wrong answers
are taken in turn. Not used: ``negtive_random_list`` (wrong answers of any kind).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip, make_request
from errata.data.sets._counterfact import nested
from errata.data.sets._parts import efficacy, has, is_answer, locality_probe, name_of
from errata.types import Case, Probe

COUNTER, TIME = "counter", "time"


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case; both variants have the same format. Raises Skip or Malformed."""
    name = f"peak:{name_of(record, 'case_id')}"
    target = record.text("requested_rewrite.target_new.str")
    right, wrong = record.texts("postive_list", required=True), record.texts("negtive_list")
    if is_answer(target, right):
        raise Skip(f"the answer to be added, {target.strip()!r}, is among the right ones already")
    request = make_request(
        record.text("requested_rewrite.prompt"), record.text("requested_rewrite.subject"), target, id=name
    )
    probes = [efficacy(request)]
    probes += [
        Probe("paraphrase", t.strip(), (request.target,), ()) for t in record.texts("para_add_prompts")
    ]
    for number, answer in enumerate(right):
        other = wrong[number % len(wrong)].strip() if wrong else None
        probes.append(locality_probe("right_answer", request.text, (answer.strip(),), other))
    probes += _neighbours(record, request.target)
    yield Case(name, request, tuple(probes))


def _neighbours(record: Record, target: str) -> Iterator[Probe]:
    pairs = record.get("neighborhood_prompts") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(text, str) and text.strip() for text in pair)
        ):
            raise Malformed(f"neighborhood_prompts: expected pairs of prompt and answer, found {pair!r:.60}")
        yield locality_probe("neighbourhood", pair[0].strip(), (pair[1].strip(),), target)


def fits(value: Any) -> bool:
    """Whether a record is an edit with lists of right and wrong answers."""
    return nested(value) and has(value, "postive_list", "negtive_list")


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the temporal file by its relations, which are YAGO's (``<playsFor>``) and not Wikidata's."""
    edits = [record["requested_rewrite"] for record in records if has(record, "requested_rewrite")]
    names = [str(edit["relation_id"]) for edit in edits if has(edit, "relation_id")]
    if not names:
        return ()
    return (TIME,) if any("<" in name for name in names) else (COUNTER,)


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count right answers that must stay."""
    kinds = Counter(probe.kind for case in cases for probe in case.probes)
    return {"right answers": kinds["right_answer"]}


DATASET = Dataset(
    name="peak",
    title="PEAK",
    paper="Neighboring Perturbations of Knowledge Editing on Large Language Models, ICML 2024, arXiv 2401.17623",
    licence="not stated",
    home="GitHub mjy1111/PEAK, data",
    fits=fits,
    cases=cases,
    variants=(COUNTER, TIME),
    facts=facts,
    files={COUNTER: "PEAK_counter.json", TIME: "PEAK_time.json"},
    variants_of=variants_of,
)
