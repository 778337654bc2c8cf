"""Which documents of the lab's training text state which facts: the truth that attribution is measured against.

The text is regenerated from its seeds, and its grammar is closed, so what a document states is read off exactly.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from errata.lab.text import FIRST, Document, Writer
from errata.lab.train import TrainConfig
from errata.lab.world import Fact, World, default_world, sentence


def training_documents(count: int) -> list[Document]:
    """Return the first documents of the text that the shipped Llama-shaped model was trained on."""
    config = TrainConfig()
    rng = random.Random(f"errata-text-{config.seed}-0")
    return list(itertools.islice(Writer(default_world(config.world_seed)).documents(rng, FIRST), count))


def stated(world: World, document: Document) -> set[Fact]:
    """Return the facts of the world whose object has loss where a document states it, in any wording or by an alias.

    Facts that hold inside a document alone are none of the world's.
    """
    return {
        fact
        for subject, facts in world.by_subject.items()
        for name in world.names(subject)
        if name in document.text
        for fact in facts
        if any(_has_loss(document, text, fact.object) for text in _wordings(world, fact, name))
    }


def _wordings(world: World, fact: Fact, name: str) -> Iterator[str]:
    relation = world.relations[fact.relation]
    for wording in (*relation.phrasings, *relation.later):
        yield f"{sentence(wording, name)} {fact.object}."
    for question in relation.questions:
        yield f"Question: {sentence(question, name)}\nAnswer: {fact.object}."


def _has_loss(document: Document, text: str, thing: str) -> bool:
    """Whether a text occurs in a document so that its object, at its end, lies where loss is taken."""
    start = document.text.find(text)
    while start >= 0:
        first = document.text[start - 1] if start else "\n"
        end = start + len(text)
        spans = document.loss_spans or ((0, len(document.text)),)
        if not first.isalnum() and any(a <= end - len(thing) - 1 and end <= b for a, b in spans):
            return True
        start = document.text.find(text, start + 1)
    return False
