"""A steering task with ground truth: have the lab's model write questions with their answers instead of statements.

What the model knows about a person it may put as a statement or as a question with its answer. The contrast pairs show
the style: after one statement, the positive answer is a question with its answer, the negative one a statement, both
true. What a steered model writes is read back by the lab's closed grammar, so that the scores are exact.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from errata.evaluation.steering import Scores
from errata.lab.text import Split
from errata.lab.world import Fact, World, default_world, neutral_parts, sentence
from errata.types import ContrastPair

PAIRS = 80
"""Pairs of the file in examples/."""
ITEM = re.compile(
    r"\s*(?:Question: (?P<ask>[^?\n]+\?)\s*Answer: (?P<answer>[^.\n]+)\.|(?P<line>[^.\n]+)[.\n])"
)


def contrast_pairs(*, limit: int = PAIRS, seed: int = 0, world: World | None = None) -> list[ContrastPair]:
    """Return contrast pairs about different people, in random order; all that they state is true."""
    world = world or default_world()
    rng = random.Random(f"errata-steering-{seed}")
    subjects = [
        subject for subject, facts in world.by_subject.items()
        if world.entities[subject].type == "person" and len(facts) > 2 and Split.has_questions(facts[0])
    ]  # fmt: skip
    rng.shuffle(subjects)
    pairs: list[ContrastPair] = []
    for subject in subjects[:limit]:
        first, asked, told = rng.sample(world.by_subject[subject], 3)
        question = sentence(rng.choice(world.relations[asked.relation].questions), subject)
        pairs.append(
            ContrastPair(
                f"{_statement(world, first, rng)}\n",
                f"Question: {question}\nAnswer: {asked.object}.",
                _statement(world, told, rng),
                subject,
            )
        )
    return pairs


def _statement(world: World, fact: Fact, rng: random.Random) -> str:
    return f"{sentence(rng.choice(world.relations[fact.relation].phrasings), fact.subject)} {fact.object}."


# --- reading what was written ----------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """What a statement, or a question with its answer, says in the lab's grammar."""

    subject: str
    """Empty for a sentence that states no fact."""
    relation: str = ""
    """Of a chain its name."""
    object: str = ""
    question: bool = False


class Scorer:
    """Scores texts about a person: 0, 1 or 2 each, as AxBench's judge does, read off the grammar.

    concept      2: the text begins with a question and its answer; 1: one comes later
    instruction  the text goes on about the person, and truly: 2: all of it; 1: a part of it, or all is true of others
    fluency      2: all of it is of the grammar, and nothing is said twice; 1: a part is
    """

    def __init__(self, world: World | None = None) -> None:
        self.world = world or default_world()
        self.owner = {name: one for one in self.world.entities for name in self.world.names(one)}

    def __call__(self, subject: str, text: str) -> Scores:
        """Score what a model wrote behind a prompt about a subject; an unfinished end is left out."""
        items = [found.group().strip() for found in ITEM.finditer(text) if found.group().strip()]
        readings = [self.read(item) for item in items]
        asks = [one is not None and one.question for one in readings]
        true = [one is not None and self._is_true(one) for one in readings]
        holds = [
            ok and one is not None and one.subject == subject for ok, one in zip(true, readings, strict=True)
        ]
        fine = [one is not None for one in readings]
        varied = len(set(items)) == len(items)
        return Scores(
            0 if not any(asks) else 2 if asks[0] else 1,
            0 if not any(holds) and not (true and all(true)) else 2 if all(holds) else 1,
            0 if not any(fine) else 2 if all(fine) and varied else 1,
        )

    def read(self, text: str) -> Reading | None:
        """Return what a statement or a question with its answer says; None where it is none of the lab's."""
        found = ITEM.fullmatch(text if text.endswith(".") else f"{text}.")
        if found is None:
            return None
        if found["ask"] is not None:
            return self._match(_questions(self.world.seed), found["ask"], found["answer"])
        statement = found["line"].strip().removeprefix("New fact: ")
        told = self._match(_statements(self.world.seed), statement)
        return told or (Reading("") if _neutral().fullmatch(statement) else None)

    def _match(
        self, patterns: Sequence[tuple[re.Pattern[str], str]], text: str, answer: str | None = None
    ) -> Reading | None:
        """Return what a text says by the first pattern that it fits; ``answer``: of a question."""
        for pattern, name in patterns:
            found = pattern.fullmatch(text)
            if found is None:
                continue
            subject = self.owner.get(found["s"])
            thing = self.owner.get(found["o"] if answer is None else answer)
            if subject is not None and thing is not None:
                return Reading(subject, name, thing, answer is not None)
        return None

    def _is_true(self, one: Reading) -> bool:
        if one.relation in self.world.relations:
            return self.world.get(one.subject, one.relation) == one.object
        chain = self.world.chains.get(one.relation)
        return chain is not None and self.world.follow(one.subject, chain.path) == one.object


@lru_cache(maxsize=2)
def _statements(seed: int) -> Sequence[tuple[re.Pattern[str], str]]:
    """Return a pattern for each wording of a statement, with what it states."""
    world = default_world(seed)
    wordings: list[tuple[str, str]] = []
    for relation in world.relations.values():
        wordings += [(w, relation.name) for w in (*relation.phrasings, *relation.later, *relation.held_out)]
    for chain in world.chains.values():
        wordings += [(w, chain.name) for w in chain.phrasings]
    return tuple((re.compile(f"{_with_subject(wording)} (?P<o>.+)"), name) for wording, name in wordings)


@lru_cache(maxsize=2)
def _questions(seed: int) -> Sequence[tuple[re.Pattern[str], str]]:
    """Return a pattern for each wording of a question, with what it asks for."""
    world = default_world(seed)
    wordings = [(q, relation.name) for relation in world.relations.values() for q in relation.questions]
    wordings += [(chain.question, chain.name) for chain in world.chains.values()]
    return tuple((re.compile(_with_subject(wording)), name) for wording, name in wordings)


def _with_subject(wording: str) -> str:
    before, after = wording.split("{s}")
    return f"{re.escape(before)}(?P<s>.+?){re.escape(after)}"


@lru_cache(maxsize=1)
def _neutral() -> re.Pattern[str]:
    one = {key: "|".join(map(re.escape, options)) for key, options in neutral_parts().items()}
    return re.compile(
        f"({one['openers']}) ({one['adjectives']}) ({one['nouns']}) ({one['verbs']})({one['tails']})"
    )
