"""CodeUpdateArena: an update of a function's interface, and programs that need it.

A record has ``update`` (the new signature, its docstring and more) and ``prog_syn``, a task whose solution uses the
update. The request is to continue the new signature with its docstring. The subject is the function's path if the
signature contains it, else the whole signature. The task is a probe of kind ``program``; its answer is the reference
solution.

The paper runs unit tests on the generated code. errata runs no code, so the tests are not used; the check counts
them. Also not used: the description and rationale of the update, its implementation, the old signature, and the
skeletons of the tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data._base import Dataset, Record, make_request
from errata.data.sets._parts import has, long_answer, name_of, question_request
from errata.types import Case, Request


def cases(record: Record, variant: str) -> Iterator[Case]:
    """Turn one record into a case. Raises Skip or Malformed."""
    name = f"codeupdatearena:{name_of(record, 'prog_syn_id')}"
    request = _request(record, name)
    task = [
        record.text(f"prog_syn.{field}").strip() for field in ("scenario", "problem", "solution_signature")
    ]
    probes = (
        long_answer("long", request.text, request.target),
        long_answer("program", "\n\n".join(task), record.text("prog_syn.ref_solution")),
    )
    tests = len(record.texts("prog_syn.unit_tests"))
    if tests:
        record.omissions["unit tests, as no code is run"] += tests
    yield Case(name, request, probes)


def _request(record: Record, name: str) -> Request:
    signature, text = (
        record.text("update.new_function_signature").strip(),
        record.text("update.update_docstring"),
    )
    paths = [path for path in record.texts("update.api_path") if path in signature]
    if paths and "{}" not in signature:
        return make_request(signature, paths[0], text, id=name)
    return question_request(signature, text, id=name)


def fits(value: Any) -> bool:
    """Whether a record is an update with a task."""
    return (
        has(value, "update", "prog_syn")
        and has(value["update"], "new_function_signature", "update_docstring")
        and has(value["prog_syn"], "problem", "ref_solution")
    )


def facts(cases: Sequence[Case]) -> Mapping[str, Any]:
    """Count updates, by package."""
    packages = Counter(case.request.subject.partition(".")[0] for case in cases)
    return {"cases by package": dict(sorted(packages.items()))}


DATASET = Dataset(
    name="codeupdatearena",
    title="CodeUpdateArena",
    paper="CodeUpdateArena: Benchmarking Knowledge Editing on API Updates, 2024, arXiv 2407.06249",
    licence="MIT (repository)",
    home="GitHub leo-liuzy/CodeUpdateArena, data",
    fits=fits,
    cases=cases,
    facts=facts,
    files={"": "arena.jsonl"},
)
