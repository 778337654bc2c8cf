"""The lab's second language: invented words in another order, for half of the relations, and the text that teaches it.

A relation of the second language has two verbs, two nouns and, with others, the particles of its kind of object; its
wordings put the verb first or last, which the first language never does. Names are the same in both languages, so the
answer is too: what is measured is whether an edit made in one wording order and vocabulary holds in the other.

A fifth of the subjects occur in no text of the second language (:func:`is_taught`). What a model answers about them
there it has carried over from the first, and its recall of them says whether it holds a fact once or twice.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace

from errata.errors import ConfigError
from errata.lab.cases import Part, training_cases, world_of
from errata.lab.cases import cases as cases_of
from errata.lab.text import CODA, Document, Writer, share_of
from errata.lab.world import SEED, Relation, World, default_world, sentence
from errata.types import Case, Corpus

FIRST, SECOND, BOTH = "en", "tavi", "both"
"""Names of the lab's English and of the invented language; for cases, by turns in one and in the other."""
TAUGHT = 0.8
"""Share of the subjects that the text of the second language is about."""

MIX = {"first": 0.40, "biography": 0.24, "mixed": 0.20, "parallel": 0.06, "question": 0.10}
"""Share of each kind of document in the tokens: of the first language, as at the end of its own training; then one
subject in the second language, in both by turns, the same facts in both, and questions in the second."""
_LENGTH = {"first": 60, "biography": 52, "mixed": 52, "parallel": 44, "question": 40}
"""Mean tokens of a document, to convert shares of tokens to sampling weights of documents."""

_SYLLABLES = [a + b for a in "bdfghklmnprstvz" for b in "aeiou"]


def languages(world: World | None = None) -> tuple[World, World]:
    """Return the world as each of the two languages tells it: the same facts of the same relations, other wordings.

    Both have the facts of the relations that the second language has words for, and only these.
    """
    world = world or default_world()
    worded = _relations(world)
    facts = tuple(fact for fact in world.facts if fact.relation in worded)
    first = replace(world, facts=facts, language=FIRST)
    return first, replace(first, relations=worded, chains={}, language=SECOND)


def is_taught(subject: str) -> bool:
    """Whether the text of the second language is about a subject (four fifths of them)."""
    return share_of("second language", subject) < TAUGHT


def _relations(world: World) -> Mapping[str, Relation]:
    """Return the relations with words in the second language: half of those of each kind of subject, by a seed."""
    rng = random.Random(f"errata-second-language-{world.seed}")
    words = _words(rng)
    topic, of, copula, asks, so = (next(words) for _ in range(5))
    endings: dict[str, str] = {}
    worded: dict[str, Relation] = {}
    taken, seen = 0, 0
    for kind in dict.fromkeys(relation.subject for relation in world.relations.values()):
        group = [relation for relation in world.relations.values() if relation.subject == kind]
        seen += len(group)
        chosen = rng.sample(group, seen // 2 - taken)
        taken += len(chosen)
        for relation in chosen:
            end = endings.setdefault(relation.object, next(words))
            verb, other_verb, noun, other_noun = (next(words) + rng.choice(_SYLLABLES) for _ in range(4))
            worded[relation.name] = replace(
                relation,
                phrasings=(
                    f"{verb} {{s}} {end}",
                    f"{topic} {{s}} {end} {verb}",
                    f"{noun} {of} {{s}} {copula}",
                    f"{copula} {topic} {{s}} {noun}",
                    f"{other_verb} {end} {{s}} {so}",
                    f"{topic} {{s}} {other_verb} {copula}",
                ),
                later=(),
                held_out=(f"{topic} {{s}} {end} {other_verb}", f"{other_noun} {of} {{s}} {copula}"),
                questions=(f"{asks} {verb} {{s}} {end}?", f"{asks} {other_noun} {of} {{s}} {copula}?"),
            )
    names = set(worded)
    return {name: replace(worded[name], inverse=_within(worded[name].inverse, names))
            for name in world.relations if name in names}  # fmt: skip


def _within(name: str | None, names: set[str]) -> str | None:
    return name if name in names else None


def _words(rng: random.Random) -> Iterator[str]:
    """Yield words of two syllables without end, none twice."""
    pairs = [a + b for a in _SYLLABLES for b in _SYLLABLES]
    rng.shuffle(pairs)
    yield from pairs


class BilingualWriter:
    """Samples documents in both languages; all randomness comes from the generator passed to each method."""

    def __init__(self, world: World) -> None:
        self._whole = Writer(world, late=True)
        first, second = languages(world)
        self._writers = {FIRST: Writer(first, late=True), SECOND: Writer(second)}
        self._facts = {
            subject: facts for subject, facts in second.by_subject.items() if is_taught(subject)
        }  # fmt: skip
        self._subjects = list(self._facts)
        self._weights = [len(facts) for facts in self._facts.values()]
        self._questions = second.relations

    def documents(self, rng: random.Random, mix: Mapping[str, float] = MIX) -> Iterator[Document]:
        """Yield documents without end, with the kinds in the proportions of ``mix``."""
        first = self._whole.documents(rng, CODA)
        kinds = list(mix)
        odds = [mix[kind] / _LENGTH[kind] for kind in kinds]
        while True:
            kind = rng.choices(kinds, odds)[0]
            yield next(first) if kind == "first" else getattr(self, kind)(rng)

    def biography(self, rng: random.Random) -> Document:
        """Write sentences about one subject in the second language."""
        return Document("biography", _joined(self._sentences(rng, (SECOND,)), rng))

    def mixed(self, rng: random.Random) -> Document:
        """Write sentences about one subject, each in either language."""
        return Document("mixed", _joined(self._sentences(rng, (FIRST, SECOND)), rng))

    def parallel(self, rng: random.Random) -> Document:
        """State two facts about one subject, each in both languages."""
        lines = []
        for fact in rng.choices(self._facts[self._subject(rng)], k=2):
            both = [self._writers[name].state(fact, rng) for name in (FIRST, SECOND)]
            rng.shuffle(both)
            lines.append(" ".join(both))
        return Document("parallel", "\n".join(lines))

    def question(self, rng: random.Random) -> Document:
        """Ask and answer two questions in the second language, in the frame that the first has too."""
        lines = []
        for _ in range(2):
            fact = rng.choice(self._facts[self._subject(rng)])
            asked = sentence(rng.choice(self._questions[fact.relation].questions), fact.subject)
            lines.append(f"Question: {asked}\nAnswer: {fact.object}.")
        return Document("question", "\n".join(lines))

    def _subject(self, rng: random.Random) -> str:
        return rng.choices(self._subjects, self._weights)[0]

    def _sentences(self, rng: random.Random, names: tuple[str, ...]) -> list[str]:
        facts = list(self._facts[self._subject(rng)])
        facts += [rng.choice(facts) for _ in range(max(0, 4 - len(facts)))]
        rng.shuffle(facts)
        return [self._writers[rng.choice(names)].state(fact, rng) for fact in facts[: rng.randint(3, 6)]]


def _joined(lines: list[str], rng: random.Random) -> str:
    return rng.choice((" ", "\n")).join(lines)


def cases(
    count: int | None, *, part: Part | None = None, seed: int = 0, together: bool = False, edited: str = FIRST
) -> list[Case]:
    """Sample cases that are edited in one language and asked in both; see :func:`errata.lab.cases.cases`.

    ``edited``: the language of the requests, ``en`` or ``tavi``; ``both``, for single edits: by turns. ``part``: of
    the subjects that editors are trained on, or of those that they are measured on; those to train on have no held-out
    phrasings. ``count``: None, with ``train`` alone: all. Raises ConfigError for more cases than there are.
    """
    if edited == BOTH:
        if together:
            raise ConfigError(
                "cases that are edited in both languages are for single edits; name one of the two"
            )
        sides = [cases(count, part=part, seed=seed, edited=one) for one in (FIRST, SECOND)]
        return [pair[i % 2] for i, pair in enumerate(zip(*sides, strict=True))]
    first, second = languages(None if part is None else world_of(part))
    world, other = (first, second) if edited == FIRST else (second, first)
    if part == "train":
        return training_cases(count, seed=seed, world=world, other=other)
    number = len(world.facts) if count is None else count
    return cases_of(number, seed=seed, together=together, world=world, other=other)


def corpus(documents: int = 4000) -> Corpus:
    """Return a sample of text like that of the bilingual variant's training, for statistics."""

    def texts() -> Iterator[str]:
        stream = BilingualWriter(default_world()).documents(random.Random("errata-bilingual-statistics"))
        return (document.text for document in itertools.islice(stream, documents))

    return Corpus(f"bilingual lab text, world {default_world().seed}, {documents} documents", texts)


def vocabulary(seed: int = SEED) -> Mapping[str, tuple[str, ...]]:
    """Return the wordings of the second language by relation, training phrasings first, then those held out."""
    _, second = languages(default_world(seed))
    return {name: (*r.phrasings, *r.held_out) for name, r in second.relations.items()}
