"""What unlearning is measured on: all facts about some subjects, what is to be kept, and facts nobody was taught."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from errata.errors import ConfigError
from errata.lab.cases import make
from errata.lab.world import SEED, Fact, World, default_world, sentence
from errata.types import Case, Request

MOST = 87
"""A tenth of the subjects. What is to be kept names none of these, however few of them are forgotten, so that boards
of different sizes keep the same."""
CONSEQUENCES = ("inverse", "one_hop", "two_hop")
"""Kinds of probes that ask what follows from a request's new target, which no unlearning method trains."""
STRANGERS_SEED = SEED + 1
"""Seed of the world whose names no model of this one has read."""


def subjects_to_forget(count: int, world: World | None = None) -> list[str]:
    """Return the first of the world's subjects in a fixed random order; fewer are the first of more.

    Raises ConfigError for more than there are.
    """
    subjects = sorted((world or default_world()).by_subject)
    if not 0 < count <= len(subjects):
        raise ConfigError(f"lab:forget: expected 1 to {len(subjects)} subjects, found {count}")
    random.Random("errata-lab-forget").shuffle(subjects)
    return subjects[:count]


def left_out(entries: Sequence[str]) -> tuple[str, ...]:
    """Return entities to leave out of a training text: each by name, or ``lab:forget:N``, the first N subjects.

    Raises ConfigError for another number of subjects than there are.
    """
    found: list[str] = []
    for entry in entries:
        _, source, number = entry.rpartition("lab:forget:")
        found += subjects_to_forget(int(number)) if source and number.isdecimal() else [entry]
    return tuple(found)


def cases_to_forget(count: int, *, seed: int = 0) -> list[Case]:
    """Return a case for each fact about the first ``count`` subjects, in one wording a relation.

    The old target is what is to be forgotten; the new one, drawn with ``seed``, is no unlearning method's business.
    Probes of other facts are about subjects that are kept. Raises ConfigError for more subjects than there are.
    """
    world = default_world()
    chosen = subjects_to_forget(count, world)
    facts = [fact for subject in chosen for fact in world.by_subject[subject]]
    gone: dict[tuple[str, str], str | None] = {(fact.subject, fact.relation): None for fact in facts}
    cases: list[Case] = []
    for i, fact in enumerate(facts):
        name = f"lab:forget:{i}"
        rng = random.Random(f"errata-{name}-{seed}")
        case = make(world, fact, rng, name, edits=gone, wording=_wording(world, fact))
        probes = tuple(probe for probe in case.probes if probe.kind not in CONSEQUENCES)
        cases.append(replace(case, probes=probes))
    return cases


def requests_to_keep(count: int, *, forgotten: int = MOST, seed: int = 0) -> list[Request]:
    """Draw facts that name none of the first ``forgotten`` subjects; the target of each is its true object.

    Raises ConfigError for more than there are.
    """
    world = default_world()
    gone = set(subjects_to_forget(forgotten, world))
    others = [fact for fact in world.facts if not gone & {fact.subject, fact.object}]
    if not 0 < count <= len(others):
        raise ConfigError(f"facts to keep: expected 1 to {len(others)}, found {count}")
    drawn = random.Random(f"errata-lab-keep-{seed}").sample(others, count)
    return [Request(sentence(_wording(world, fact), "{}"), fact.subject, fact.object) for fact in drawn]


def strangers(requests: Sequence[Request]) -> list[tuple[int, Request]]:
    """Return requests with names that no text of the world has in place of their subjects, and whose place they take.

    Wording and old target are those of a request of :func:`cases_to_forget`, so that nothing else tells whether it was
    in the training text. Left out are subjects of kinds that have no names to spare: cities and countries.
    """
    world, other = default_world(), default_world(STRANGERS_SEED)
    spare: dict[str, list[str]] = {}
    for name, entity in other.entities.items():
        if name not in world.entities:
            spare.setdefault(entity.type, []).append(name)
    found: list[tuple[int, Request]] = []
    for i, request in enumerate(requests):
        names = spare.get(world.entities[request.subject].type)
        if names:
            name = random.Random(f"errata-stranger-{request.subject}").choice(names)
            found.append((i, replace(request, subject=name)))
    return found


def biographies(subjects: Sequence[str], *, seed: int = 0) -> list[str]:
    """Write all facts about each subject in one text, in wordings of the training text."""
    from errata.lab.text import Writer

    world = default_world()
    writer, rng = Writer(world), random.Random(f"errata-biographies-{seed}")
    return [" ".join(writer.state(fact, rng) for fact in world.by_subject[subject]) for subject in subjects]


def _wording(world: World, fact: Fact) -> str:
    return world.relations[fact.relation].phrasings[0]
