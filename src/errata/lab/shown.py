"""Cases about what is in a picture: the lab's world asked about by pictures, by names, and by neither.

A request asks about "this person" (city, company ...) beside a picture, which is the subject. Its probes ask the same
beside another picture of the same entity, in other words, beside a picture of another entity, beside none, and by the
entity's name in text alone; what is not about the edited fact must stay as it was.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache

from errata.errors import ConfigError
from errata.lab import pictures
from errata.lab.world import Fact, World, default_world, sentence
from errata.types import IMAGE, Case, Gallery, Picture, Probe, Request

NEIGHBOURS = 3
"""Other entities asked about in a case."""
VIEWS = 4
"""Pictures of each entity in the gallery that statistics are taken over."""


def deixis(wording: str, kind: str) -> str:
    """Put "this person", "this city" and so on in a wording's place for the subject."""
    text = wording.replace("{s}", f"this {kind}")
    return text[0].upper() + text[1:]


def in_place(wording: str) -> str:
    """Put the picture itself in a wording's place for the subject, with no space before it."""
    return sentence(wording, IMAGE).replace(f" {IMAGE}", IMAGE)


def asked(wording: str, kind: str) -> str:
    """Ask a question about a picture that stands before it."""
    return f"{IMAGE}Question: {deixis(wording, kind)}\nAnswer:"


@lru_cache(maxsize=2048)
def shown(world_seed: int, name: str, number: int) -> Picture:
    """Return a picture of an entity as requests have it; ``number`` says which of its pictures."""
    image = pictures.picture(default_world(world_seed), name, number)
    return Picture.of(pictures.png(image), f"{name}, picture {number}")


def facts(world: World) -> list[Fact]:
    """Return the facts about entities that have pictures."""
    return [fact for name in pictures.pictured(world) for fact in world.by_subject[name]]


def gallery() -> Gallery:
    """Return prompts beside pictures for statistics, half with the picture in the subject's place.

    They show every entity that has pictures :data:`VIEWS` times, in pictures that no case has.
    """
    world = default_world()

    def items() -> Iterator[tuple[str, Picture]]:
        rng = random.Random("errata-gallery")
        for view in range(VIEWS):
            for name in rng.sample(pictures.pictured(world), len(pictures.pictured(world))):
                fact = rng.choice(world.by_subject[name])
                wording = rng.choice(world.relations[fact.relation].phrasings)
                text = in_place(wording) if view % 2 else IMAGE + deixis(wording, world.entities[name].type)
                yield text, shown(world.seed, name, pictures.TRAINING + view)

    return Gallery(f"lab pictures, world {world.seed}, {VIEWS} of each", items)


def cases(count: int, *, seed: int = 0) -> list[Case]:
    """Sample counterfactual requests about pictures, with their probes; no two are about one entity.

    Kinds, all beside a picture unless they say otherwise: efficacy, other_view (another picture of the entity),
    paraphrase (phrasings never trained on), question, picture_subject (the picture in the subject's place), by_name
    (text alone, with the entity's name), other_picture (another entity's), no_picture, same_subject (its other
    relations), picture_locality (other relations of other entities), neighbourhood (text alone, of other entities).
    Raises ConfigError for more cases than there are entities with pictures.
    """
    world = default_world()
    names = list(pictures.pictured(world))
    random.Random(f"errata-shown-{seed}").shuffle(names)
    if not 0 < count <= len(names):
        raise ConfigError(f"lab-vl cases: expected 1 to {len(names)}, found {count}")
    made = []
    for number, name in enumerate(names[:count]):
        rng = random.Random(f"errata-shown-{seed}-{name}")
        made.append(_case(world, rng.choice(world.by_subject[name]), rng, f"lab-vl:{seed}:{number}"))
    return made


def _case(world: World, fact: Fact, rng: random.Random, name: str) -> Case:
    relation, kind = world.relations[fact.relation], world.entities[fact.subject].type
    target = rng.choice([o for o in world.objects(fact.relation) if o not in (fact.object, fact.subject)])
    prompt = deixis(rng.choice(relation.phrasings), kind)
    request = Request(
        IMAGE + prompt, IMAGE, target, fact.object, name, image=shown(world.seed, fact.subject, 0)
    )
    return Case(name, request, tuple(_probes(world, fact, target, IMAGE + prompt, kind, rng)))


def _probes(
    world: World, fact: Fact, target: str, prompt: str, kind: str, rng: random.Random
) -> Iterator[Probe]:
    relation = world.relations[fact.relation]
    new, old = world.names(target), world.names(fact.object)
    first, second = (shown(world.seed, fact.subject, number) for number in (0, 1))

    def changed(name: str, text: str, image: Picture | None) -> Probe:
        return Probe(name, text, new, old, fact.object, image=image)

    yield changed("efficacy", prompt, first)
    yield changed("other_view", prompt, second)
    for wording in relation.held_out:
        yield changed("paraphrase", IMAGE + deixis(wording, kind), first)
    for wording in relation.questions:
        yield changed("question", asked(wording, kind), first)
    yield changed("picture_subject", in_place(rng.choice(relation.phrasings)), first)
    yield changed("by_name", sentence(rng.choice(relation.phrasings), fact.subject), None)
    yield Probe("no_picture", prompt.replace(IMAGE, ""), old, old, target)
    for other in rng.sample([f for f in world.by_subject[fact.subject] if f.relation != fact.relation], 1):
        wording = rng.choice(world.relations[other.relation].phrasings)
        yield _kept(world, "same_subject", IMAGE + deixis(wording, kind), other, target, first)
    yield from _others(world, fact, target, prompt, rng)


def _others(world: World, fact: Fact, target: str, prompt: str, rng: random.Random) -> Iterator[Probe]:
    """Yield what is asked about other entities: by their pictures, by their names."""
    names = set(pictures.pictured(world)) - {fact.subject, fact.object, target}
    same = [f for f in world.by_relation[fact.relation] if f.subject in names]
    for other in rng.sample(same, min(NEIGHBOURS, len(same))):
        yield _kept(world, "other_picture", prompt, other, target, shown(world.seed, other.subject, 0))
    for subject in rng.sample(sorted(names), NEIGHBOURS):
        other = rng.choice(world.by_subject[subject])
        relation = world.relations[other.relation]
        text = IMAGE + deixis(rng.choice(relation.phrasings), world.entities[subject].type)
        yield _kept(world, "picture_locality", text, other, target, shown(world.seed, subject, 0))
    pool = [
        f for f in world.by_relation[fact.relation] if f.subject not in (fact.subject, fact.object, target)
    ]
    for other in rng.sample(pool, min(NEIGHBOURS, len(pool))):
        text = sentence(rng.choice(world.relations[fact.relation].phrasings), other.subject)
        yield _kept(world, "neighbourhood", text, other, target, None)


def _kept(world: World, name: str, text: str, fact: Fact, target: str, image: Picture | None) -> Probe:
    answers = world.names(fact.object)
    return Probe(name, text, answers, answers, target if target not in answers else None, image=image)
