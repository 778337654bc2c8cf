"""The lab's world: a seeded, typed knowledge graph with natural names.

All facts are known, so the effect of an edit can be checked against ground truth. The relations, their
phrasings and the lists of names are data (``data/*.yaml``); this file samples entities and facts from a seed and
answers queries on the graph.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

import yaml

SEED = 20
"""Seed of the world that the shipped model was trained on."""

COUNTS = {"person": 420, "city": 100, "country": 20, "company": 100, "work": 140, "landmark": 90}
"""Number of entities of each type that occurs as a subject."""

SHARE_MARRIED = 0.6
ALIASES = {"person": 60, "company": 30, "city": 20}


@dataclass(frozen=True)
class Entity:
    """An entity of the world."""

    name: str
    type: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A (subject, relation, object) triple; subject and object are entity names."""

    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Relation:
    """A kind of fact with its wordings; ``{s}`` in them is the subject."""

    name: str
    subject: str
    """Type of the subject."""
    object: str
    """Type of the object."""
    phrasings: tuple[str, ...]
    """Cloze sentences that occur in the training text."""
    later: tuple[str, ...]
    """More of them, used in the last part of the training only."""
    held_out: tuple[str, ...]
    """Cloze sentences that never occur in it."""
    questions: tuple[str, ...]
    inverse: str | None = None
    """Name of the relation read from the object's side."""
    symmetric: bool = False


@dataclass(frozen=True)
class Chain:
    """A composition of relations with its own wordings."""

    name: str
    path: tuple[str, ...]
    phrasings: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class World:
    """Entities, relations and facts; a pure function of its seed."""

    seed: int
    entities: Mapping[str, Entity]
    relations: Mapping[str, Relation]
    chains: Mapping[str, Chain]
    facts: tuple[Fact, ...]
    _index: Mapping[tuple[str, str], str] = field(repr=False)
    language: str | None = None
    """Name of the language that the wordings are in, where there are two: :mod:`errata.lab.bilingual`."""

    @staticmethod
    def make(seed: int = SEED) -> World:
        """Generate a world from a seed."""
        names = _data("names.yaml")
        tables = _data("relations.yaml")
        rng = random.Random(f"errata-world-{seed}")
        entities = _entities(names, rng)
        relations = {
            name: Relation(
                name=name,
                subject=row["subject"],
                object=row["object"],
                phrasings=tuple(row["phrasings"]),
                later=tuple(row["later"]),
                held_out=tuple(row["held_out"]),
                questions=tuple(row["questions"]),
                inverse=row.get("inverse"),
                symmetric=row.get("symmetric", False),
            )
            for name, row in tables["relations"].items()
        }
        chains = {
            name: Chain(name, tuple(row["path"]), tuple(row["phrasings"]), row["question"])
            for name, row in tables["chains"].items()
        }
        facts = tuple(_facts(entities, relations, rng))
        index = {(fact.subject, fact.relation): fact.object for fact in facts}
        return World(seed, {e.name: e for e in entities}, relations, chains, facts, index)

    @cached_property
    def by_subject(self) -> Mapping[str, tuple[Fact, ...]]:
        """All facts of a subject."""
        groups: dict[str, list[Fact]] = {}
        for fact in self.facts:
            groups.setdefault(fact.subject, []).append(fact)
        return {name: tuple(group) for name, group in groups.items()}

    @cached_property
    def by_relation(self) -> Mapping[str, tuple[Fact, ...]]:
        """All facts of a relation."""
        groups: dict[str, list[Fact]] = {}
        for fact in self.facts:
            groups.setdefault(fact.relation, []).append(fact)
        return {name: tuple(group) for name, group in groups.items()}

    def get(self, subject: str, relation: str) -> str | None:
        """Return the object of a fact, or None where the world has no such fact."""
        return self._index.get((subject, relation))

    def objects(self, relation: str) -> tuple[str, ...]:
        """All objects that occur with a relation, sorted."""
        return tuple(sorted({fact.object for fact in self.by_relation[relation]}))

    def names(self, name: str) -> tuple[str, ...]:
        """Return an entity's name followed by its aliases."""
        entity = self.entities.get(name)
        return (name, *entity.aliases) if entity else (name,)

    def follow(
        self, subject: str, path: tuple[str, ...], instead: Mapping[tuple[str, str], str] | None = None
    ) -> str | None:
        """Follow a path of relations; ``instead``: facts that replace the world's own."""
        at: str | None = subject
        for relation in path:
            if at is None:
                return None
            at = (instead or {}).get((at, relation)) or self.get(at, relation)
        return at

    def chain_facts(self) -> Iterator[tuple[str, Chain, str]]:
        """Yield every (subject, chain, answer) that holds in the world."""
        for chain in self.chains.values():
            for fact in self.by_relation.get(chain.path[0], ()):
                answer = self.follow(fact.subject, chain.path)
                if answer is not None and answer != fact.subject:
                    yield fact.subject, chain, answer


@lru_cache(maxsize=4)
def default_world(seed: int = SEED) -> World:
    """Return the shipped world, generated once per process."""
    return World.make(seed)


@lru_cache(maxsize=2)
def _data(name: str) -> Any:
    return yaml.safe_load((files("errata.lab") / "data" / name).read_text(encoding="utf-8"))


def neutral_parts() -> Mapping[str, list[str]]:
    """Return the word lists for sentences that state no fact."""
    return _data("names.yaml")["neutral"]


def sentence(template: str, subject: str) -> str:
    """Fill a wording with its subject."""
    return template.replace("{s}", subject)


# --- sampling -----------------------------------------------------------------------------------

_PLAIN_TYPES = {
    "continent": "continent_names", "currency": "currency_names", "language": "language_names",
    "river": "river_names", "instrument": "instruments", "profession": "professions",
    "industry": "industries", "genre": "genres", "material": "materials", "product": "products",
}  # fmt: skip


def _entities(names: Mapping[str, Any], rng: random.Random) -> list[Entity]:
    pools = {
        "city": [*names["city_names"]],
        "country": [*names["country_names"]],
        "person": _people(names, rng),
        "company": _pairs(names["company_roots"], names["company_kinds"], rng),
        "work": [f"The {w}" for w in _pairs(names["work_adjectives"], names["work_nouns"], rng)],
        "landmark": _pairs(names["landmark_roots"], names["landmark_kinds"], rng),
    }
    stage = [a + b for a in names["stage_starts"] for b in names["stage_ends"]]
    nicknames = [f"{a} of {b}" for a in names["city_nickname_heads"] for b in names["city_nickname_tails"]]
    roots = rng.sample(names["company_roots"], ALIASES["company"])
    rng.shuffle(stage)
    rng.shuffle(nicknames)
    entities = []
    for kind, count in COUNTS.items():
        entity_names = pools[kind][:count]
        aliases: dict[str, tuple[str, ...]] = dict.fromkeys(entity_names, ())
        if kind == "company":  # a company's other name: its root's "Group", one company a root
            for root in roots:
                owner = next((name for name in entity_names if name.startswith(root + " ")), None)
                if owner:
                    aliases[owner] = (f"{root} Group",)
        elif kind in ALIASES:
            pool = stage if kind == "person" else nicknames
            for name, alias in zip(rng.sample(entity_names, ALIASES[kind]), pool, strict=False):
                aliases[name] = (alias,)
        entities += [Entity(name, kind, aliases[name]) for name in entity_names]
    for kind, key in _PLAIN_TYPES.items():
        entities += [Entity(name, kind) for name in names[key]]
    return entities


def _people(names: Mapping[str, Any], rng: random.Random) -> list[str]:
    surnames = [a + b for a in names["surname_starts"] for b in names["surname_ends"]]
    people = [f"{first} {last}" for first in names["first_names"] for last in surnames]
    rng.shuffle(people)
    example = "Ada Brenner"  # the person of the README's example
    people.remove(example)
    return [example, *people]


def _pairs(heads: list[str], tails: list[str], rng: random.Random) -> list[str]:
    pairs = [f"{head} {tail}" for head in heads for tail in tails]
    rng.shuffle(pairs)
    return pairs


_PAIRED = {"founder_of": "founded_by", "author_of": "author", "designer_of": "designed_by"}


def _facts(entities: list[Entity], relations: Mapping[str, Relation], rng: random.Random) -> Iterator[Fact]:
    pools: dict[str, list[str]] = {}
    for entity in entities:
        pools.setdefault(entity.type, []).append(entity.name)
    people = pools["person"]
    makers = rng.sample(people, sum(len(pools[relations[r].object]) for r in _PAIRED))
    for maker_relation, of in _PAIRED.items():  # one maker each, so that the inverse has one answer
        for thing in pools[relations[maker_relation].object]:
            maker = makers.pop()
            yield Fact(maker, maker_relation, thing)
            yield Fact(thing, of, maker)
    couples = rng.sample(people, int(len(people) * SHARE_MARRIED) // 2 * 2)
    for a, b in zip(couples[::2], couples[1::2], strict=True):
        yield Fact(a, "married_to", b)
        yield Fact(b, "married_to", a)
    home = {}
    for position, city in enumerate(pools["city"]):  # every country has cities; the first is its capital
        home[city] = pools["country"][position % len(pools["country"])]
        yield Fact(city, "located_in", home[city])
        if position < len(pools["country"]):
            yield Fact(city, "capital_of", home[city])
            yield Fact(home[city], "capital", city)
    already_present = {*_PAIRED, *_PAIRED.values(), "married_to", "located_in", "capital", "capital_of"}
    for relation in relations.values():
        if relation.name in already_present:
            continue
        subjects = pools[relation.subject]
        if relation.name == "official_language":  # one language a country
            objects = rng.sample(pools["language"], len(subjects))
        else:
            objects = [rng.choice(pools[relation.object]) for _ in subjects]
        for subject, thing in zip(subjects, objects, strict=True):
            yield Fact(subject, relation.name, thing)
