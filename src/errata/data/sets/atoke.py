"""AToKe: facts that were replaced at a known time, asked of the present and of the past.

A record has ``requested_rewrite``, a step or a list of steps one after the other, each with ``prompt``, ``subject``,
``target_new`` and ``target_true`` (``str``), ``time_prompt`` and the years ``time_new`` and ``time_true`` (``since``,
``until``); a step's ``evaluation`` asks the new fact of the present (``completion``, ``questions``,
``paraphrase_completion``) and of its years (``time_completion``, ``time_questions``, ``paraphrase_time_completion``).
``history_evaluation`` has the same fields for what each step replaced. ``answer`` and ``new_answer`` are answers
before and after each step, with ``answer_alias`` and ``new_answer_alias``; with one step they are not nested.

The last step is the case's request. Steps before it hold no more, so that they are requested by ``time_prompt``, of
their years; all requests of a case are then true together. Every request has ``valid_from``. Kinds: ``current``
(CRS), ``explicit_time`` (CES), ``historical`` (HES: of the years before all steps, which the edit must not change) and
``former`` (HRS: asked without years what was once true, where any answer before the last is right). Variant ``ee``: the
object stays and its years grow; ``time_prompt`` is the request, and ``current`` must stay as it is. Not used:
``relation``, ids of objects, and ``gptj``, which says what GPT-J held for current.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from errata.data._base import Dataset, Malformed, Record, make_request
from errata.data.sets._parts import count, efficacy, has, is_answer, name_of, rival_to, spellings
from errata.data.times import CURRENT, EXPLICIT, FORMER, HISTORICAL
from errata.types import Case, Probe, Request

HOST = "https://raw.githubusercontent.com/Arvid-pku/ATOKE/main/datasets"
SINGLE, MULTIPLE, EXTENDED = "se", "me", "ee"
PRESENT = ("completion", "questions", "paraphrase_completion")
YEARS = ("time_completion", "time_questions", "paraphrase_time_completion")


@dataclass(frozen=True)
class Step:
    """One replacement of a fact."""

    record: Record
    new: tuple[str, ...]
    """Spellings of the answer since the step."""
    old: tuple[str, ...]
    """Spellings of the answer before it."""

    @property
    def since(self) -> str:
        """The year since which the new answer holds. Raises Malformed."""
        year = self.record.get("time_new.since")
        if not isinstance(year, int) or isinstance(year, bool) or not 1000 <= year <= 9999:
            raise Malformed(f"time_new.since: expected a year, found {year!r:.40}")
        return str(year)

    def request(self, id: str, *, by: str = "prompt", old: bool = True) -> Request:
        """Return the step as a request by one of its prompts; ``old``: with what it replaces. Raises Skip."""
        made = make_request(
            self.record.text(by), self.record.text("subject"), self.new[0], self.old[0] if old else None, id
        )
        return replace(made, valid_from=self.since)


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn a record into a case whose requests are true together. Raises Skip or Malformed."""
    name = f"atoke:{name_of(record, 'case_id')}"
    steps = _steps(record)
    if variant == EXTENDED:
        yield _extended(name, steps)
        return
    last = steps[-1].request(name if len(steps) == 1 else f"{name}.{len(steps)}")
    earlier = [
        step.request(f"{name}.{i}", by="time_prompt", old=False) for i, step in enumerate(steps[:-1], 1)
    ]
    first, new = steps[0].old, steps[-1].new
    probes = [efficacy(last, new, first)]
    probes += [Probe("efficacy", one.text, step.new, ()) for one, step in zip(earlier, steps, strict=False)]
    seen = {probe.prompt for probe in probes}
    for prompt in _texts(steps[-1].record, "evaluation", PRESENT, seen):
        probes.append(Probe(CURRENT, prompt, new, first, rival_to(new, last.target_old, first)))
    for step in steps:
        for prompt in _texts(step.record, "evaluation", YEARS, seen):
            probes.append(Probe(EXPLICIT, prompt, step.new, ()))
    yield Case(name, last, (*probes, *_past(record, steps, seen)), tuple(earlier))


def _past(record: Record, steps: Sequence[Step], seen: set[str]) -> Iterator[Probe]:
    """Ask what each step replaced: of its years, and without years."""
    history = _list(record, "history_evaluation")
    if history and len(history) != len(steps):
        raise Malformed(
            f"history_evaluation: expected {len(steps)} as requested_rewrite, found {len(history)}"
        )
    former = spellings(steps[-1].old[0], [text for step in reversed(steps) for text in step.old])
    for i, (past, step) in enumerate(zip(history, steps, strict=False)):
        rival = rival_to(step.old, steps[-1].new[0], steps[-1].new)
        for prompt in _texts(past, "", YEARS, seen):
            if i == 0:
                yield Probe(HISTORICAL, prompt, step.old, step.old, rival)
            else:  # of what an earlier step of the case has brought
                yield Probe(EXPLICIT, prompt, step.old, (), rival)
        for prompt in _texts(past, "", PRESENT, seen):
            yield Probe(FORMER, prompt, former, (), rival_to(former, steps[-1].new[0], steps[-1].new))


def _extended(name: str, steps: Sequence[Step]) -> Case:
    """Return the case of a fact that goes on for longer. Raises Malformed where its object changes."""
    if len(steps) != 1 or not is_answer(steps[0].new[0], steps[0].old):
        raise Malformed("requested_rewrite: expected one step whose target_new is its target_true")
    (step,) = steps
    request = step.request(name, by="time_prompt", old=False)
    probes = [Probe("efficacy", request.text, step.new, ())]
    seen = {request.text}
    evaluation = [*_texts(step.record, "evaluation", YEARS, seen)]
    probes += [Probe(EXPLICIT, prompt, step.new, ()) for prompt in evaluation]
    kept = _texts(step.record, "evaluation", PRESENT, seen)
    probes += [Probe(CURRENT, prompt, step.new, step.new) for prompt in kept]
    return Case(name, request, tuple(probes))


def _steps(record: Record) -> list[Step]:
    """Read the steps with the spellings of their answers. Raises Malformed."""
    items = _list(record, "requested_rewrite")
    if not items:
        raise Malformed("requested_rewrite: expected at least one edit, found none")
    new, old = (_answers(record, path, len(items)) for path in ("new_answer", "answer"))
    return [
        Step(
            item,
            spellings(item.text("target_new.str"), after),
            spellings(item.text("target_true.str"), before),
        )
        for item, after, before in zip(items, new, old, strict=True)
    ]


def _answers(record: Record, path: str, count: int) -> list[tuple[str, ...]]:
    """Return the answers of each step with their aliases; with one step they may stand in no list of their own."""
    found = [_nested(record, name, count) for name in (path, f"{path}_alias")]
    return [(*answers, *aliases) for answers, aliases in zip(*found, strict=True)]


def _nested(record: Record, path: str, count: int) -> list[tuple[str, ...]]:
    value = record.get(path, [])
    items: Any = [value] if isinstance(value, str) else value
    if count == 1 and isinstance(items, list) and all(isinstance(item, str) for item in items):
        items = [items]
    if isinstance(items, list) and not items:
        items = [[]] * count
    if not isinstance(items, list) or len(items) != count:
        raise Malformed(f"{path}: expected answers for each of {count} edits, found {value!r:.60}")
    return [Record({path: item}, record.where, record.index).texts(path) for item in items]


def _list(record: Record, path: str) -> list[Record]:
    """Return records that stand in a list, or alone where there is one of them."""
    value = record.get(path)
    single = Record({path: [value]}, record.where, record.index, record.omissions, record.base)
    return (single if isinstance(value, Mapping) else record).records(path)


def _texts(record: Record, path: str, fields: Sequence[str], seen: set[str]) -> Iterator[str]:
    """Yield the questions of some fields that no probe asks yet."""
    for field in fields:
        for text in record.texts(f"{path}.{field}" if path else field):
            if text.strip() not in seen:
                seen.add(text.strip())
                yield text.strip()


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count the questions of each sort, and cases by their edits."""
    kinds = (CURRENT, EXPLICIT, HISTORICAL, FORMER)
    counts = {kind: count(cases, kind) for kind in kinds}
    return {**counts, "cases by edits": dict(sorted(Counter(len(case.requests) for case in cases).items()))}


def fits(value: Any) -> bool:
    """Whether a record has edits with years."""
    edits = value.get("requested_rewrite") if isinstance(value, Mapping) else None
    first = edits[0] if isinstance(edits, list) and edits else edits
    return has(first, "prompt", "subject", "target_new", "time_prompt", "time_new")


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Recognise several edits in a record, and edits that keep their object."""
    edits = [record["requested_rewrite"] for record in records if fits(record)]
    if any(isinstance(edit, list) and len(edit) > 1 for edit in edits):
        return (MULTIPLE,)
    single = [edit[0] if isinstance(edit, list) else edit for edit in edits]
    if single and all(edit.get("target_new") == edit.get("target_true") for edit in single):
        return (EXTENDED,)
    return (SINGLE, MULTIPLE)


DATASET = Dataset(
    name="atoke",
    title="AToKe",
    paper="History Matters: Temporal Knowledge Editing in Large Language Model, AAAI 2024, arXiv 2312.05497",
    licence="not stated",
    home="GitHub Arvid-pku/ATOKE, folder datasets",
    fits=fits,
    cases=cases,
    variants=(SINGLE, MULTIPLE, EXTENDED),
    variants_of=variants_of,
    facts=facts,
    files={SINGLE: "AToKe-SE.json", MULTIPLE: "AToKe-ME.json", EXTENDED: "AToKe-EE.json"},
    urls={
        SINGLE: f"{HOST}/AToKe-SE.json",
        MULTIPLE: f"{HOST}/AToKe-ME.json",
        EXTENDED: f"{HOST}/AToKe-EE.json",
    },
)
