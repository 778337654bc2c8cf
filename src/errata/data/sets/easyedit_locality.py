"""EasyEdit's EMNLP 2023 locality sets: distracting neighbours, other facts of the subject, other tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from errata.data._base import Dataset, Malformed, Record, Skip
from errata.data.sets._counterfact import neighbourhood_probes, nested, rewrite
from errata.data.sets._files import read_records
from errata.data.sets._parts import LOCALITY_FIELDS, count, efficacy, has, locality_probe, name_of, spellings
from errata.data.sets.easyedit_portability import portability_probes
from errata.errors import DataError
from errata.types import Case, Probe

KINDS = ("neighbourhood", "distracting", "same_subject", "other_task")


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case: the edit and the locality questions of its row.

    CounterFact rows have ``distracting_neighborhood_prompts`` (the edit, then the neighbour's prompt), the plain
    neighbours, and ``unrelated_relation``, another fact of the subject. Fields decide, not the variant, which only
    names the file; the published files have both, and the question of ``easyedit_portability``, which is probed
    too. A row of PIQA has no edit and is skipped with that reason: :func:`with_commonsense` adds its questions to
    other cases. Raises Skip or Malformed.
    """
    if has(record.value, "goal"):
        raise Skip(
            "a PIQA row has no request: it measures what other edits preserve; add the rows to cases with "
            "errata.data.sets.easyedit_locality.with_commonsense"
        )
    name = f"easyedit_locality:{name_of(record, 'case_id')}"
    request = rewrite(record, name)
    probes = list(neighbourhood_probes(request, record.texts("neighborhood_prompts")))
    probes += neighbourhood_probes(request, record.texts("distracting_neighborhood_prompts"), "distracting")
    if has(record.value, "unrelated_relation"):
        right = spellings(record.text("unrelated_relation.object"))
        probes.append(
            locality_probe(
                "same_subject", record.text("unrelated_relation.question").strip(), right, request.target
            )
        )
    if not probes:
        raise Skip("the row has no locality question, only the edit itself")
    probe = efficacy(request)
    yield Case(name, request, (probe, *probes, *portability_probes(record, request, probe.before)))


def commonsense(path: Path, labels: Path | None = None) -> list[Probe]:
    """Read PIQA, ``piqa_valid.jsonl``: a goal and two solutions, of which ``label`` 0 or 1 names the right one.

    ``labels``: the file ``piqa_valid-labels.lst`` with one label a line, where rows do not carry theirs. The
    two whole solutions are the choices. Raises DataError where a file cannot be read or the numbers differ,
    Malformed for a bad row.
    """
    rows = read_records(path)
    answers = [row.get("label") for row in rows] if labels is None else _lines(labels)
    if len(answers) != len(rows):
        raise DataError(
            f"{path} has {len(rows)} rows and {labels} {len(answers)} labels; both must be of the same split"
        )
    return [_goal(row, str(label)) for row, label in zip(rows, answers, strict=True)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _goal(row: Record, label: str) -> Probe:
    if label not in ("0", "1"):
        raise Malformed(f"{row.where}: label: expected 0 or 1, found {label!r}")
    choices = (row.text("sol1").strip(), row.text("sol2").strip())
    right = (choices[int(label)],)
    prompt = f"Question: {row.text('goal').strip()}\nAnswer:"
    return Probe("other_task", prompt, right, right, form="choice", choices=choices)


def with_commonsense(cases: Sequence[Case], probes: Sequence[Probe]) -> list[Case]:
    """Put the questions of :func:`commonsense` to cases; of n cases the i-th gets every n-th, so all are asked once."""
    return [replace(case, probes=(*case.probes, *probes[i :: len(cases)])) for i, case in enumerate(cases)]


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count the probes of each kind."""
    return {kind: count(cases, kind) for kind in KINDS if count(cases, kind)}


def fits(value: Any) -> bool:
    """Whether a record is an edit with questions of one of the sets, or a row of PIQA."""
    if has(value, "goal", "sol1", "sol2"):
        return True
    return nested(value) and any(name in value for name in LOCALITY_FIELDS)


def variants_of(records: Sequence[Any]) -> Sequence[str]:
    """Tell the sets by the questions of a record; one that holds both may be of either."""
    if any(has(record, "goal") for record in records):
        return ("piqa",)
    both = {"distracting": LOCALITY_FIELDS[0], "other-attribution": LOCALITY_FIELDS[1]}
    return tuple(name for name, field in both.items() if any(has(record, field) for record in records))


DATASET = Dataset(
    name="easyedit_locality",
    title="EasyEdit locality (EMNLP 2023)",
    paper="Editing Large Language Models: Problems, Methods, and Opportunities, EMNLP 2023, arXiv 2305.13172",
    licence="MIT (repository)",
    home="GitHub zjunlp/EasyEdit, README, the archive editing-data, folder locality",
    fits=fits,
    cases=cases,
    variants=("distracting", "other-attribution", "piqa"),
    variants_of=variants_of,
    facts=facts,
    files={
        "distracting": "counterfact_distracting_neighbor.json",
        "other-attribution": "counterfact_other_attribution.json",
        "piqa": "piqa_valid.jsonl",
    },
)
