"""Counterfactual cases from the lab's world, with every probe that follows from the graph."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Literal

from errata.errors import ConfigError, RequestError
from errata.lab.world import Chain, Fact, World, default_world, sentence
from errata.registry import nearest
from errata.types import Case, Probe, Request

NEIGHBOURS = 5
SAME_SUBJECT = 5

Edits = Mapping[tuple[str, str], str | None]
"""The effect of edits by (subject, relation): the new object, or None where the old object no longer applies."""


Part = Literal["train", "test"]
"""Which subjects an editor is trained on, and which it is measured on."""
PARTS: tuple[Part, ...] = ("train", "test")
TEST_SHARE = 0.25
"""Share of the subjects that are for measuring, see :func:`world_of`."""


def world_of(part: Part, world: World | None = None) -> World:
    """Return the world with the facts of those subjects alone that editors are trained on, or measured on.

    Which facts follow from others is that of the whole world.
    """
    world = world or default_world()
    subjects = sorted(world.by_subject)
    test = set(random.Random("errata-lab-test").sample(subjects, round(TEST_SHARE * len(subjects))))
    return replace(world, facts=tuple(f for f in world.facts if (f.subject in test) == (part == "test")))


def training_cases(
    count: int | None = None, *, seed: int = 0, world: World | None = None, other: World | None = None
) -> list[Case]:
    """Sample cases to train an editor on: all of them, or ``count``; none shares a subject with ``world_of("test")``.

    Neither requests nor neighbours do, and phrasings that measure (paraphrase) are left out. ``world``, ``other``: the
    training part in two languages, as for :func:`cases`. Raises ConfigError for more cases than there are.
    """
    world = world or world_of("train")
    drawn = cases(len(world.facts) if count is None else count, seed=seed, world=world, other=other)
    measured = ("paraphrase", "cross_paraphrase")
    return [replace(case, probes=tuple(p for p in case.probes if p.kind not in measured)) for case in drawn]


def cases(
    count: int,
    *,
    seed: int = 0,
    together: bool = False,
    world: World | None = None,
    other: World | None = None,
) -> list[Case]:
    """Sample counterfactual requests uniformly over all facts, with their probes.

    Kinds: efficacy, paraphrase (phrasings never trained on), paraphrase_seen, question,
    neighbourhood (same relation, other subject, some sharing the old object), same_subject (its other
    relations), inverse, one_hop and two_hop (one or two further relations away), alias.

    With ``together`` the cases are for a run that has all edits in place. No two requests then have the same
    subject and relation, and none the inverse of another; probes whose answer with all edits differs from the
    answer with their own case's edit alone, or is undefined, are left out. A smaller ``count`` gives the first
    requests of a larger one.

    ``other``: the same world in another language (:func:`errata.lab.bilingual.languages`), whose wordings are asked
    too, under the kinds cross_efficacy, cross_paraphrase, cross_question, cross_neighbourhood and cross_same_subject.

    Raises ConfigError for more cases than there are.
    """
    world = world or default_world()
    if not 0 < count <= len(world.facts):
        raise ConfigError(f"lab cases: expected 1 to {len(world.facts)}, found {count}")
    if together:
        return _together(world, count, seed, other)
    rng = random.Random(f"errata-cases-{seed}")
    return [
        make(world, fact, rng, f"lab:{seed}:{i}", other=other)
        for i, fact in enumerate(rng.sample(world.facts, count))
    ]


def make(
    world: World, fact: Fact, rng: random.Random, name: str, target: str | None = None,
    edits: Edits | None = None, other: World | None = None, wording: str | None = None,
) -> Case:  # fmt: skip
    """Build the case that gives a fact another object: ``target``, or a random one.

    ``edits``: the effect of all edits in place; probes whose answer they change are left out. ``other``: as for
    :func:`cases`. ``wording``: one of the relation's; None: a random one.
    """
    relation = world.relations[fact.relation]
    if target is None:
        target = rng.choice(_options(world, fact))
    wording = wording or rng.choice(relation.phrasings)
    request = Request(sentence(wording, "{}"), fact.subject, target, fact.object, name, world.language)
    probes = [*_Probes(world, fact, target, wording, rng, edits).all()]
    if other is not None:
        wording = rng.choice(other.relations[fact.relation].phrasings)
        probes += _Probes(other, fact, target, wording, rng, edits).crossed()
    return Case(name, request, tuple(probes))


def _options(world: World, fact: Fact) -> list[str]:
    return [o for o in world.objects(fact.relation) if o not in (fact.object, fact.subject)]


def _together(world: World, count: int, seed: int, other: World | None) -> list[Case]:
    """Sample requests that do not contradict one another, then the probes valid with all of them."""
    rng = random.Random(f"errata-cases-together-{seed}")
    pairs: list[tuple[Fact, str]] = []
    claims: set[tuple[str, str]] = set()
    for fact in rng.sample(world.facts, len(world.facts)):
        options = [o for o in _options(world, fact) if claims.isdisjoint(_claims(world, fact, o))]
        if options:
            target = rng.choice(options)
            claims.update(_claims(world, fact, target))
            pairs.append((fact, target))
        if len(pairs) == count:
            break
    else:
        raise ConfigError(
            f"lab cases: found {len(pairs)} requests that do not contradict one another, "
            f"expected {count}; seed {seed} has {len(pairs)}; ask for at most that many"
        )
    edits: dict[tuple[str, str], str | None] = {}
    for fact, target in pairs:
        edits |= consequences(world, fact, target)
    for fact, target in pairs:  # a request's own claim takes precedence over another's None
        edits |= _claims(world, fact, target)
    drawn_cases = []
    for i, (fact, target) in enumerate(pairs):
        name = f"lab:{seed}:{i}"
        rng = random.Random(f"errata-together-{name}")
        drawn_cases.append(make(world, fact, rng, name, target, edits, other))
    return drawn_cases


def _back(world: World, relation: str) -> str | None:
    """Return the inverse relation; None where it has several answers."""
    entry = world.relations[relation]
    return entry.name if entry.symmetric else entry.inverse


def _claims(world: World, fact: Fact, target: str) -> Edits:
    """Return what a request itself claims: its new fact and the inverse of it."""
    back = _back(world, fact.relation)
    own = (fact.subject, fact.relation)
    return {own: target} if back is None else {own: target, (target, back): fact.subject}


def consequences(world: World, fact: Fact, target: str) -> Edits:
    """Return how giving a fact another object changes the graph, by (subject, relation).

    In a one-to-one relation, the old object and the target's former counterpart then have no answer: None.
    """
    back = _back(world, fact.relation)
    if back is None:
        return _claims(world, fact, target)
    effects: dict[tuple[str, str], str | None] = {(fact.object, back): None}
    former = world.get(target, back)
    if former is not None:
        effects[former, fact.relation] = None
    return {**effects, **_claims(world, fact, target)}


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
                with_old_target = Request(request.prompt, request.subject, target, fact.object, name)
                return Case(name, with_old_target, tuple(builder.all()))
    wordings = [sentence(w, "{}") for f in world.by_subject[request.subject]
             for w in world.relations[f.relation].phrasings]  # fmt: skip
    near = nearest(request.prompt, wordings)
    raise RequestError(f"{request.prompt!r} is not a wording of the lab's relations; the nearest is {near!r}")


class _Probes:
    """Probes of the consequences of replacing one fact's object, if all edits in place agree with them."""

    def __init__(
        self, world: World, fact: Fact, target: str, wording: str, rng: random.Random,
        edits: Edits | None = None,
    ) -> None:  # fmt: skip
        self.world, self.fact, self.target, self.wording, self.rng = world, fact, target, wording, rng
        self.relation = world.relations[fact.relation]
        self.instead = {(fact.subject, fact.relation): target}
        self.edits = edits or {}

    def all(self) -> Iterator[Probe]:
        """Yield every probe."""
        yield self._changed_probe("efficacy", self.wording)
        for wording in self.relation.held_out:
            yield self._changed_probe("paraphrase", wording)
        others = [w for w in self.relation.phrasings if w != self.wording]
        for wording in self.rng.sample(others, 2):
            yield self._changed_probe("paraphrase_seen", wording)
        for wording in self.relation.questions:
            yield self._changed_probe("question", f"Question: {wording}\nAnswer:")
        yield from self._neighbours()
        yield from self._same_subject()
        yield from self._inverse()
        yield from self._chains()
        for alias in self.world.names(self.fact.subject)[1:]:
            yield self._changed_probe("alias", self.wording, alias)

    def crossed(self) -> Iterator[Probe]:
        """Yield the probes that are asked in another language than the request's, under kinds of their own."""
        wordings = [("efficacy", self.wording), *(("paraphrase", one) for one in self.relation.held_out)]
        wordings += [("question", f"Question: {one}\nAnswer:") for one in self.relation.questions]
        probes = [self._changed_probe(kind, wording) for kind, wording in wordings]
        for probe in (*probes, *self._neighbours(), *self._same_subject()):
            yield replace(probe, kind=f"cross_{probe.kind}")

    def _changed_probe(self, kind: str, wording: str, subject: str | None = None) -> Probe:
        return Probe(
            kind,
            sentence(wording, subject or self.fact.subject),
            self.world.names(self.target),
            self.world.names(self.fact.object),
            self.fact.object,
            language=self.world.language,
        )

    def _kept_probes(self, kind: str, wording: str, fact: Fact) -> Iterator[Probe]:
        if not self._agreed(fact.subject, (fact.relation,), fact.object):
            return
        answers = self.world.names(fact.object)
        rival = self.target if self.target not in answers else None
        prompt = sentence(wording, fact.subject)
        yield Probe(kind, prompt, answers, answers, rival, language=self.world.language)

    def _agreed(self, subject: str, path: tuple[str, ...], answer: str) -> bool:
        """Whether following a path with all edits in place gives the answer."""
        at: str | None = subject
        for relation in path:
            if at is None:
                return False
            at = self.edits[at, relation] if (at, relation) in self.edits else self.world.get(at, relation)
        return at == answer

    def _neighbours(self) -> Iterator[Probe]:
        pool = [f for f in self.world.by_relation[self.relation.name] if f.subject != self.fact.subject]
        if self.relation.symmetric:  # the spouses' own facts are consequences, not neighbours
            pool = [f for f in pool if f.subject not in (self.fact.object, self.target)]
        same = [f for f in pool if f.object == self.fact.object]
        rest = [f for f in pool if f.object != self.fact.object]
        facts = self.rng.sample(same, min(2, len(same)))
        facts += self.rng.sample(rest, min(NEIGHBOURS - len(facts), len(rest)))
        for fact in facts:
            yield from self._kept_probes("neighbourhood", self.wording, fact)

    def _same_subject(self) -> Iterator[Probe]:
        others = [f for f in self.world.by_subject[self.fact.subject] if f.relation != self.relation.name]
        for fact in self.rng.sample(others, min(SAME_SUBJECT, len(others))):
            wording = self.rng.choice(self.world.relations[fact.relation].phrasings)
            yield from self._kept_probes("same_subject", wording, fact)

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
            language=self.world.language,
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
        if self.edits and not self._agreed(self.fact.subject, chain.path, after):
            return
        answers, old = self.world.names(after), self.world.names(before)
        rival = before if answers != old else None
        prompt = sentence(wording, self.fact.subject)
        yield Probe(kind, prompt, answers, old, rival, language=self.world.language)


def neutral_texts(count: int, *, seed: int = 0) -> list[str]:
    """Generate sentences that state no fact, for perplexity."""
    from errata.lab.text import Writer

    writer = Writer(default_world())
    rng = random.Random(f"errata-neutral-{seed}")
    return [writer.neutral(rng).text for _ in range(count)]
