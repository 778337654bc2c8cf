"""Counterfactual cases from the lab's world, with every probe that follows from the graph."""

from __future__ import annotations

import random
from collections.abc import Iterator

from errata.errors import ConfigError, RequestError
from errata.lab.world import Chain, Fact, World, default_world, sentence
from errata.registry import nearest
from errata.types import Case, Probe, Request

NEIGHBOURS = 5
SAME_SUBJECT = 5


def cases(count: int, *, seed: int = 0, world: World | None = None) -> list[Case]:
    """Draw counterfactual requests over all relations, facts alike probable, with their probes.

    Kinds: efficacy, paraphrase (phrasings never trained on), paraphrase_seen, question,
    neighbourhood (same relation, other subject, some sharing the old object), same_subject (its other
    relations), inverse, one_hop and two_hop (one or two further relations away), alias.
    """
    world = world or default_world()
    rng = random.Random(f"errata-cases-{seed}")
    if not 0 < count <= len(world.facts):
        raise ConfigError(f"lab cases: expected 1 to {len(world.facts)}, found {count}")
    return [
        make(world, fact, rng, f"lab:{seed}:{i}") for i, fact in enumerate(rng.sample(world.facts, count))
    ]


def make(world: World, fact: Fact, rng: random.Random, name: str, target: str | None = None) -> Case:
    """Build the case that gives a fact another object: drawn at random, unless named."""
    relation = world.relations[fact.relation]
    if target is None:
        options = [o for o in world.objects(fact.relation) if o not in (fact.object, fact.subject)]
        target = rng.choice(options)
    wording = rng.choice(relation.phrasings)
    request = Request(sentence(wording, "{}"), fact.subject, target, fact.object, name)
    builder = _Probes(world, fact, target, wording, rng)
    return Case(name, request, tuple(builder.all()))


def case_of(request: Request, *, seed: int = 0, world: World | None = None) -> Case:
    """Build the case of a request about the world, its prompt in one of the relation's wordings.

    Raises RequestError when the world does not know the subject or no wording fits.
    """
    world = world or default_world()
    if request.subject not in world.by_subject:
        near = nearest(request.subject, list(world.by_subject))
        hint = f"; did you mean {near!r}?" if near else ""
        raise RequestError(f"the lab's world does not know {request.subject!r}{hint}")
    for fact in world.by_subject[request.subject]:
        relation = world.relations[fact.relation]
        for wording in (*relation.phrasings, *relation.held_out):
            if sentence(wording, request.subject) == request.text.rstrip():
                rng = random.Random(f"errata-case-{seed}-{request.text}")
                name = request.id or request.text
                target, builder = request.target, _Probes(world, fact, request.target, wording, rng)
                given = Request(request.prompt, request.subject, target, fact.object, name)
                return Case(name, given, tuple(builder.all()))
    known = [sentence(w, "{}") for f in world.by_subject[request.subject]
             for w in world.relations[f.relation].phrasings]  # fmt: skip
    near = nearest(request.prompt, known)
    raise RequestError(f"{request.prompt!r} is no wording of the lab's relations; the nearest is {near!r}")


class _Probes:
    """The consequences of replacing one fact's object."""

    def __init__(self, world: World, fact: Fact, target: str, wording: str, rng: random.Random) -> None:
        self.world, self.fact, self.target, self.wording, self.rng = world, fact, target, wording, rng
        self.relation = world.relations[fact.relation]
        self.instead = {(fact.subject, fact.relation): target}

    def all(self) -> Iterator[Probe]:
        """Yield every probe."""
        yield self._changed("efficacy", self.wording)
        for wording in self.relation.held_out:
            yield self._changed("paraphrase", wording)
        others = [w for w in self.relation.phrasings if w != self.wording]
        for wording in self.rng.sample(others, 2):
            yield self._changed("paraphrase_seen", wording)
        for wording in self.relation.questions:
            yield self._changed("question", f"Question: {wording}\nAnswer:")
        yield from self._neighbours()
        yield from self._same_subject()
        yield from self._inverse()
        yield from self._chains()
        for alias in self.world.names(self.fact.subject)[1:]:
            yield self._changed("alias", self.wording, alias)

    def _changed(self, kind: str, wording: str, subject: str | None = None) -> Probe:
        return Probe(
            kind,
            sentence(wording, subject or self.fact.subject),
            self.world.names(self.target),
            self.world.names(self.fact.object),
            self.fact.object,
        )

    def _kept(self, kind: str, wording: str, fact: Fact) -> Probe:
        answers = self.world.names(fact.object)
        rival = self.target if self.target not in answers else None
        return Probe(kind, sentence(wording, fact.subject), answers, answers, rival)

    def _neighbours(self) -> Iterator[Probe]:
        pool = [f for f in self.world.by_relation[self.relation.name] if f.subject != self.fact.subject]
        if self.relation.symmetric:  # the spouses' own facts are consequences, not neighbours
            pool = [f for f in pool if f.subject not in (self.fact.object, self.target)]
        same = [f for f in pool if f.object == self.fact.object]
        rest = [f for f in pool if f.object != self.fact.object]
        chosen = self.rng.sample(same, min(2, len(same)))
        chosen += self.rng.sample(rest, min(NEIGHBOURS - len(chosen), len(rest)))
        for fact in chosen:
            yield self._kept("neighbourhood", self.wording, fact)

    def _same_subject(self) -> Iterator[Probe]:
        others = [f for f in self.world.by_subject[self.fact.subject] if f.relation != self.relation.name]
        for fact in self.rng.sample(others, min(SAME_SUBJECT, len(others))):
            wording = self.rng.choice(self.world.relations[fact.relation].phrasings)
            yield self._kept("same_subject", wording, fact)

    def _inverse(self) -> Iterator[Probe]:
        name = self.relation.name if self.relation.symmetric else self.relation.inverse
        if name is None:
            return
        wording = self.rng.choice(self.world.relations[name].phrasings)
        before = self.world.get(self.target, name)
        yield Probe(
            "inverse",
            sentence(wording, self.target),
            self.world.names(self.fact.subject),
            self.world.names(before) if before else (),
            before,
        )

    def _chains(self) -> Iterator[Probe]:
        for chain in self.world.chains.values():
            kind = {2: "one_hop", 3: "two_hop"}[len(chain.path)]
            if chain.path[0] == self.relation.name:
                yield from self._chain(kind, chain)

    def _chain(self, kind: str, chain: Chain) -> Iterator[Probe]:
        before = self.world.follow(self.fact.subject, chain.path)
        after = self.world.follow(self.fact.subject, chain.path, self.instead)
        if before is None or after is None or after == self.fact.subject:
            return
        wording = self.rng.choice(chain.phrasings)
        answers, old = self.world.names(after), self.world.names(before)
        rival = before if answers != old else None
        yield Probe(kind, sentence(wording, self.fact.subject), answers, old, rival)


def neutral_texts(count: int, *, seed: int = 0) -> list[str]:
    """Write sentences that state no fact, for perplexity."""
    from errata.lab.text import Writer

    writer = Writer(default_world())
    rng = random.Random(f"errata-neutral-{seed}")
    return [writer.neutral(rng).text for _ in range(count)]
