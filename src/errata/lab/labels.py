"""Labelled texts of the lab's world: what kind of entity a name is, or the object of one of its relations."""

from __future__ import annotations

import random
from collections.abc import Iterator

from errata.errors import ConfigError
from errata.lab.world import World, default_world, sentence
from errata.registry import unknown
from errata.types import LabelledText

KIND = "kind"
"""The concept of an entity's kind: person, city, country, company, work or landmark."""


def labelled_texts(
    concept: str, *, limit: int | None = None, seed: int = 0, world: World | None = None
) -> list[LabelledText]:  # fmt: skip
    """Return a sentence for each subject that has the concept, in random order; the label is about its name.

    ``concept``: ``kind``, whose sentences do not give it away before the name, or a relation, whose label is the
    fact's object, in sentences about other relations. ``limit``: texts at most. Raises ConfigError for an unknown one.
    """
    world = world or default_world()
    if concept != KIND and concept not in world.relations:
        raise ConfigError(unknown(concept, [KIND, *world.relations], "concept of the lab"))
    texts = list(_texts(concept, world, random.Random(f"errata-labels-{concept}-{seed}")))
    random.Random(f"errata-labels-order-{seed}").shuffle(texts)
    return texts[:limit]


def _texts(concept: str, world: World, rng: random.Random) -> Iterator[LabelledText]:
    for subject, facts in world.by_subject.items():
        label = world.entities[subject].type if concept == KIND else world.get(subject, concept)
        others = [fact for fact in facts if fact.relation != concept]
        if label is None or not others:
            continue
        wordings = [
            wording for fact in others for wording in world.relations[fact.relation].phrasings
            if concept != KIND or wording.startswith("{s}")
        ]  # fmt: skip
        yield LabelledText(sentence(rng.choice(wordings), subject), label, subject)
