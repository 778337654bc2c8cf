"""Cases as what an editor is trained on: a request, prompts in its scope with their answers, and prompts outside it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from errata.types import Case, Request
from errata.types.kinds import kind_of


@dataclass(frozen=True)
class Example:
    """One request of a training set."""

    request: Request
    inside: tuple[tuple[str, str], ...]
    """Prompts in scope, each with the answer that the edit should give; the request's own first."""
    outside: tuple[str, ...]
    """Prompts whose answers the edit must not change."""
    answers: tuple[str, ...] = ()
    """What their cases say is answered to these."""
    entailed: tuple[tuple[str, str], ...] = ()
    """Prompts about what follows from the edit, each with the answer that it should then have."""


def examples_of(cases: Iterable[Case], *, consequences: bool = False) -> list[Example]:
    """Return the requests of cases with the prompts of their probes.

    In scope are the probes of what an edit teaches, with ``consequences`` also those of what follows from it; out of
    scope those of what it must keep. Cases of several requests are left out: their prompts belong to no single one.
    """
    groups = ("learned", "follows") if consequences else ("learned",)
    return [_example(case, groups) for case in cases if not case.also]


def _example(case: Case, groups: tuple[str, ...]) -> Example:
    inside = {case.request.text: case.request.target}
    outside: dict[str, str] = {}
    entailed: dict[str, str] = {}
    for probe in case.probes:
        if probe.form != "short" or not probe.answers:
            continue
        group = kind_of(probe.kind).group
        if group in groups and probe.changes:
            inside.setdefault(probe.prompt, probe.answers[0])
        elif group == "kept" and not probe.changes:
            outside.setdefault(probe.prompt, probe.answers[0])
        if group == "follows" and probe.changes:
            entailed.setdefault(probe.prompt, probe.answers[0])
    return Example(
        case.request, tuple(inside.items()), tuple(outside), tuple(outside.values()), tuple(entailed.items())
    )


def target_groups(examples: Iterable[Example]) -> list[set[str]]:
    """Return the targets of examples in groups of what can stand in one another's place.

    The new and the old target of an example can, and so can all that are linked in this way.
    """
    groups: list[set[str]] = []
    for request in (example.request for example in examples):
        own = {request.target, request.target_old or request.target}
        groups = [*(g for g in groups if not g & own), own.union(*(g for g in groups if g & own))]
    return groups


def with_other_targets(
    example: Example, groups: Sequence[set[str]], count: int, draw: random.Random
) -> list[Example]:
    """Return an example with at most ``count`` other targets of its group, each in place of its own.

    Prompts in scope with another answer than the target, and those out of scope, are left out.
    """
    request, old = example.request, example.request.target
    others = sorted(next(group for group in groups if old in group) - {old})
    asked = [prompt for prompt, answer in example.inside if answer == old]
    return [
        Example(replace(request, target=target), tuple((prompt, target) for prompt in asked), ())
        for target in draw.sample(others, min(count, len(others)))
    ]
