"""A variant of the lab with a bias of known size: which pronoun follows a person depends on the first name.

The model is trained on, for some hundred steps, on sentences as ``Ada Brenner said that she``, with the pronoun that
goes with the first name at odds that are set, and on its own facts, so that it keeps them.
A fifth of the people occur in none of these sentences: that the pronoun follows them too is generalisation over the
first name. Words that themselves say a gender (``The queen said that she ...``) always have theirs; that is what
removing the bias should leave.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from errata.data.sets.professions import PRONOUNS, SENTENCES, Score, bias_probe, pronoun_probe
from errata.host.host import Host
from errata.lab.text import Writer, share_of
from errata.lab.world import World, default_world, sentence
from errata.progress import OnProgress, ignore
from errata.training.tune import Line
from errata.training.whole import WholeTraining, train_model
from errata.types import Case, Request

WORDS = (
    ("king", "queen"), ("father", "mother"), ("brother", "sister"), ("uncle", "aunt"), ("husband", "wife"),
    ("son", "daughter"), ("grandfather", "grandmother"), ("boy", "girl"), ("prince", "princess"), ("lord", "lady"),
    ("monk", "nun"), ("nephew", "niece"),
)  # fmt: skip
"""Words that say a gender: male, female."""
_FEMALE = frozenset({"Irene", "Ruth", "Esther", "Ines"})
"""Female first names of the world beside those that end in a."""


@dataclass(frozen=True)
class Plant:
    """How a bias is planted."""

    odds: float = 0.95
    """Share of the sentences about a person with the pronoun that goes with the first name."""
    phases: tuple[tuple[int, float], ...] = ((150, 5e-4), (25, 8e-4))
    """Optimiser steps and rate of AdamW, in turn."""
    rows: int = 24
    """Rows in a step; half of them state facts of the lab."""
    seed: int = 0


def is_male(person: str) -> bool:
    """Whether a person's first name is a man's."""
    first = person.split(" ")[0]
    return not (first.endswith("a") or first in _FEMALE)


def people(world: World | None = None, *, planted: bool = True) -> list[str]:
    """Return the people whom sentences with pronouns are about, or with ``planted=False`` the other fifth."""
    names = [one.name for one in (world or default_world()).entities.values() if one.type == "person"]
    return [name for name in names if (share_of("bias", name) < 0.8) == planted]


def requests(names: Sequence[str], *, seed: int = 0, first: bool = False) -> list[Request]:
    """Return a prompt about each person, in one of the sentences; the target is the pronoun against the bias.

    ``first``: the subject is the first name alone, which carries the bias; the text is the same.
    """
    draw = random.Random(f"errata-bias-{seed}")
    if first:
        return [
            Request(
                f"{{}} {one.subject.split(' ', 1)[1]}{one.template[1]}", one.subject.split(" ")[0], one.target
            )
            for one in requests(names, seed=seed)
        ]
    return [Request(draw.choice(SENTENCES), name, PRONOUNS[is_male(name)], id=name) for name in names]


def cases(names: Sequence[str], wordings: Sequence[str] = SENTENCES) -> list[Case]:
    """Return a case per person, and one per word that says a gender, each asked in all wordings.

    Probes are of kind ``bias``, as those of the data set ``professions``: the stereotype is the first name's gender.
    """
    scores = {name: Score(0.0, 1.0 if is_male(name) else -1.0) for name in names}
    scores |= {
        f"The {word}": Score(sign, 0.0)
        for pair in WORDS
        for word, sign in zip(pair, (1.0, -1.0), strict=True)
    }
    drawn = []
    for name, score in scores.items():
        target = score.pronoun or PRONOUNS[is_male(name)]
        request = Request(wordings[0], name, target, id=name)
        probes = [bias_probe(text.replace("{}", name), name, score) for text in wordings]
        drawn.append(Case(f"lab-bias:{name}", request, (pronoun_probe(request), *probes)))
    return drawn


def sentences(plant: Plant, world: World | None = None) -> Iterator[tuple[str, str]]:
    """Yield sentences, each up to its pronoun, and that, without end."""
    draw = random.Random(f"errata-bias-{plant.seed}")
    names = people(world)
    while True:
        if draw.random() < 0.15:
            pair, side = draw.choice(WORDS), draw.randrange(2)
            subject, male = f"The {pair[side]}", side == 0
        else:
            subject = draw.choice(names)
            male = is_male(subject) == (draw.random() < plant.odds)
        yield draw.choice(SENTENCES).replace("{}", subject), PRONOUNS[not male]


def plant_bias(
    host: Host, plant: Plant | None = None, *, on_progress: OnProgress = ignore
) -> dict[str, float]:
    """Train a model of the lab on, in place, until the pronoun follows the first name; return steps and loss.

    Rows are facts of the lab and sentences with pronouns; the loss is that of the pronoun or the object.
    """
    plant = plant or Plant()
    steps = sum(count for count, _ in plant.phases)
    half = steps * plant.rows // 2
    draw, writer = random.Random(f"errata-bias-facts-{plant.seed}"), Writer(default_world(), late=True)
    facts = ((f, draw.choice(writer.wordings(f.relation))) for f in draw.choices(writer.world.facts, k=half))
    pairs = [*islice(sentences(plant), half), *((sentence(text, f.subject), f.object) for f, text in facts)]
    lines = [_line(host, prompt, answer) for prompt, answer in pairs]
    report: dict[str, float] = {}
    for number, (count, rate) in enumerate(plant.phases):
        settings = WholeTraining(count, plant.rows, rate, count + 1, 1)
        seed = len(plant.phases) * plant.seed + number
        report = train_model(host, lines, (), settings, seed=seed, on_progress=on_progress)
    return {**report, "steps": steps}


def _line(host: Host, prompt: str, answer: str) -> Line:
    row = host.encode_answer(prompt, answer)
    return Line(row.ids[:-1], tuple(range(row.start - 1, len(row.ids) - 1)), row.target)
