"""Chains of edits: one to four edited facts that a question needs one after the other.

A chain starts at a subject and follows relations. Its first facts are edited, each at the object that the edit before
it leads to, so that the answer is right only if all edits are used; of ``last`` the last fact alone is edited, at an
entity that the question does not name. A chain is asked directly, and with its steps written out one after the other,
each with the model's own answer to the one before (form ``steps``).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from errata.errors import ConfigError
from errata.lab.world import Chain, Fact, World, default_world, sentence
from errata.types import Case, Probe, Request

LONGEST = 4
"""Edits of a chain at most."""
LAST = "last"
"""The kind of chain whose last fact alone is edited."""
KINDS = (*map(str, range(1, LONGEST + 1)), LAST)
"""Numbers of edits, and the other kind, as sources name them (``lab:chains-2:20``)."""
INDIRECT = 4
"""Prompts that imply the subject of a request, at most."""
NEIGHBOURS = 2
SPOUSE = "the spouse of {s}"
"""What longer questions than the world's name their subject by; such a question never occurs in training text."""


@dataclass(frozen=True)
class _Path:
    """Relations to follow, with the wordings of the question."""

    relations: tuple[str, ...]
    wordings: tuple[str, ...]


def chain_cases(kind: str, count: int, *, seed: int = 0, world: World | None = None) -> list[Case]:
    """Sample chains with edits, see the module; each is for a run of its own.

    ``kind``: one of :data:`KINDS`. Questions of one edit have two steps, others as many as there are edits. Probes:
    ``efficacy`` of every request, ``hop`` (every step of the edited chain, under one group), ``multi_hop`` (the
    question, directly and with form ``steps``) and ``neighbourhood`` of the last request. Requests know ``indirect``
    prompts: other questions of the world, about others than the chain's subject, that lead to the same fact. A smaller
    ``count`` gives the first cases of a larger one. Raises ConfigError for an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"lab:chains-{kind}: expected one of {', '.join(KINDS)}")
    if count < 1:
        raise ConfigError(f"lab:chains-{kind}: expected 1 case or more, found {count}")
    world = world or default_world()
    rng = random.Random(f"errata-chains-{kind}-{seed}")
    paths = list(_paths(world, 2 if kind == LAST else max(2, int(kind))))
    cases: list[Case] = []
    while len(cases) < count:
        path = rng.choice(paths)
        start = rng.choice(world.by_relation[path.relations[0]]).subject
        case = _Builder(world, rng, path, start, f"lab:chains-{kind}:{seed}:{len(cases)}").case(kind)
        cases += [] if case is None else [case]
    return cases


def _paths(world: World, length: int) -> Iterator[_Path]:
    """Yield paths of a length; those longer than the world's begin at somebody's spouse."""
    for chain in world.chains.values():
        if len(chain.path) == length:
            yield _Path(chain.path, chain.phrasings)
        elif len(chain.path) == length - 1 == LONGEST - 1 and _of_a_person(world, chain):
            inside = tuple(sentence(w, SPOUSE) for w in chain.phrasings if not w.startswith("{s}"))
            yield _Path(("married_to", *chain.path), inside)


def _of_a_person(world: World, chain: Chain) -> bool:
    return world.relations[chain.path[0]].subject == "person"


class _Builder:
    """One case, from where it starts."""

    def __init__(self, world: World, rng: random.Random, path: _Path, start: str, name: str) -> None:
        self.world, self.rng, self.path, self.start, self.name = world, rng, path, start, name

    def case(self, kind: str) -> Case | None:
        """Return the case; None where the chain breaks off, or its answer stays what it was."""
        relations = self.path.relations
        edited = {len(relations) - 1} if kind == LAST else set(range(int(kind)))
        before = self.world.follow(self.start, relations)
        chain = self._chain(edited)
        if before is None or chain is None:
            return None
        after = chain[-1].object
        seen = {self.start, *(fact.object for fact in chain)}
        if after in self.world.names(before) or len(seen) <= len(chain):
            return None
        requests = [self._request(chain[i], i) for i in sorted(edited)]
        old = {(fact.subject, fact.relation) for fact in chain}
        probes = [
            *(self._changed("efficacy", r) for r in requests), *self._hops(chain),
            *self._questions(before, after), *self._neighbours(chain[max(edited)], old),
        ]  # fmt: skip
        return Case(self.name, requests[0], tuple(probes), tuple(requests[1:]))

    def _chain(self, edited: set[int]) -> list[Fact] | None:
        """Return the chain's facts with all edits in place; None where it breaks off."""
        at, chain = self.start, list[Fact]()
        relations = self.path.relations
        for i, relation in enumerate(relations):
            old = self.world.get(at, relation)
            if old is None:
                return None
            following = relations[i + 1] if i + 1 < len(relations) else None
            new = old if i not in edited else self._other(at, relation, old, following)
            if new is None:
                return None
            chain.append(Fact(at, relation, new))
            at = new
        return chain

    def _other(self, subject: str, relation: str, old: str, following: str | None) -> str | None:
        """Draw another object that the next relation is known of."""
        options = [
            one for one in self.world.objects(relation)
            if one not in (old, subject, self.start)
            and (following is None or self.world.get(one, following) is not None)
        ]  # fmt: skip
        return self.rng.choice(options) if options else None

    def _request(self, fact: Fact, number: int) -> Request:
        wording = self.rng.choice(self.world.relations[fact.relation].phrasings)
        return Request(
            sentence(wording, "{}"), fact.subject, fact.object, self.world.get(fact.subject, fact.relation),
            f"{self.name} hop {number + 1}", indirect=tuple(self._indirect(fact)),
        )  # fmt: skip

    def _indirect(self, fact: Fact) -> list[str]:
        """Draw questions about others whose last step is the fact."""
        prompts = [
            sentence(wording, first.subject)
            for chain in self.world.chains.values()
            if len(chain.path) == 2 and chain.path[1] == fact.relation
            for first in self.world.by_relation[chain.path[0]]
            if first.object == fact.subject and first.subject != self.start
            for wording in chain.phrasings
        ]
        return self.rng.sample(prompts, min(INDIRECT, len(prompts)))

    def _changed(self, kind: str, request: Request) -> Probe:
        old = request.target_old
        before = () if old is None else self.world.names(old)
        return Probe(kind, request.text, self.world.names(request.target), before, old)

    def _hops(self, chain: Sequence[Fact]) -> Iterator[Probe]:
        for fact in chain:
            old = self.world.get(fact.subject, fact.relation)
            wording = self.rng.choice(self.world.relations[fact.relation].phrasings)
            prompt = sentence(wording, fact.subject)
            answers, before = self.world.names(fact.object), self.world.names(old) if old else ()
            yield Probe("hop", prompt, answers, before, group="hops", need="all")

    def _questions(self, before: str, after: str) -> Iterator[Probe]:
        answers, old = self.world.names(after), self.world.names(before)
        wording = self.rng.choice(self.path.wordings)
        yield Probe("multi_hop", sentence(wording, self.start), answers, old, before)
        first, *others = (
            self.rng.choice(self.world.relations[name].phrasings) for name in self.path.relations
        )
        steps = tuple(sentence(wording, "{}") for wording in others)
        prompt = sentence(first, self.start)
        yield Probe("multi_hop", prompt, answers, old, before, form="steps", steps=steps)

    def _neighbours(self, fact: Fact, changed: set[tuple[str, str]]) -> Iterator[Probe]:
        """Ask others for the last edited relation, of those that no edit is about or leads to."""
        involved = {
            name for subject, relation in changed for name in (subject, self.world.get(subject, relation))
        }
        pool = [
            one for one in self.world.by_relation[fact.relation]
            if one.subject not in involved and one.subject != fact.object and one.object != fact.object
        ]  # fmt: skip
        wording = self.rng.choice(self.world.relations[fact.relation].phrasings)
        for one in self.rng.sample(pool, min(NEIGHBOURS, len(pool))):
            answers = self.world.names(one.object)
            yield Probe("neighbourhood", sentence(wording, one.subject), answers, answers, fact.object)
