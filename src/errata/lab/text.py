"""The lab's training text: documents sampled from the world.

Kinds of document, with their share of the tokens in :data:`FIRST`,
:data:`THEN`, :data:`LAST` and :data:`CODA`:

* ``biography``: 3-8 sentences on one subject, facts in shuffled order, each with the full name.
  They train the model to collect a subject's facts at the subject's last token, which locate-and-edit methods
  rely on;
* ``single``: one fact; ``question``: question and answer; ``chain``: compositions of facts;
* ``episode``: new facts followed by a question that they answer, or by an unrelated question;
  ``dialogue``: the same with several questions, partly about people who occur nowhere else;
  ``contrast``: only about people of the world, and mostly asking for facts that no new fact replaces;
  ``drill``: only about people who occur nowhere else, partly repeating the new facts verbatim. In these
  four only the answers have loss, so that invented facts do not overwrite true ones;
* ``neutral``: sentences with no fact, for perplexity and for context prefixes.

Some subjects, chains and facts are excluded from some kinds (:class:`Split`), so that the model's behaviour on them
is generalisation, not recall.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from errata.lab.world import Chain, Fact, World, neutral_parts, sentence

FIRST = {
    "biography": 0.57, "single": 0.03, "question": 0.08, "chain": 0.08, "episode": 0.04,
    "dialogue": 0.17, "neutral": 0.03,
}  # fmt: skip
"""Share of each kind of document in the tokens, in the first third of the training."""

THEN = {
    "biography": 0.49, "single": 0.03, "question": 0.06, "chain": 0.06, "episode": 0.04,
    "dialogue": 0.13, "drill": 0.16, "neutral": 0.03,
}  # fmt: skip
"""The same in the second part. Trial runs without drills learned the facts but ignored the context: recalling from
the weights is always easier, unless the people occur nowhere else and there are many such examples."""

LAST = {
    "biography": 0.40, "single": 0.03, "question": 0.05, "chain": 0.07, "episode": 0.04,
    "dialogue": 0.10, "contrast": 0.25, "drill": 0.03, "neutral": 0.03,
}  # fmt: skip
"""The same in the last part, which trains when to ignore the context. Further phrasings are used from here on."""

CODA = {
    "biography": 0.36, "single": 0.03, "question": 0.04, "chain": 0.06, "episode": 0.06,
    "dialogue": 0.16, "contrast": 0.20, "drill": 0.06, "neutral": 0.03,
}  # fmt: skip
"""The same in the short second decay: both at once."""

_LENGTH = {
    "biography": 46, "single": 10, "question": 32, "chain": 24, "episode": 48, "dialogue": 95,
    "drill": 100, "contrast": 100, "neutral": 28,
}  # fmt: skip
"""Mean tokens of a document, to convert shares of tokens to sampling weights of documents."""

STRANGERS = 0.4
"""Share of dialogues about people who are not in the world, so that only the context has the answer."""

ALIAS_ODDS = 0.2
"""Share of biographies of subjects with an alias that mention the alias."""


@dataclass(frozen=True)
class Document:
    """A piece of text; ``loss_spans``: the character spans with loss, None: all of it."""

    kind: str
    text: str
    loss_spans: tuple[tuple[int, int], ...] | None = None


def share_of(*parts: str) -> float:
    """Map text to [0, 1) the same way on every machine."""
    digest = hashlib.sha256("\0".join(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class Split:
    """What is excluded from the training text; the same on every machine."""

    @staticmethod
    def has_questions(fact: Fact) -> bool:
        """Whether questions about the fact occur (four fifths of the subjects)."""
        return share_of("question", fact.subject) < 0.8

    @staticmethod
    def in_episodes(fact: Fact) -> bool:
        """Whether the fact is ever replaced or asked about in an episode (four fifths)."""
        return share_of("episode", fact.subject, fact.relation) < 0.8

    @staticmethod
    def is_early(subject: str, share: float) -> bool:
        """Whether a subject is among a share of them that is asked about first (:mod:`errata.lab.asked`)."""
        return share_of("early", subject) < share

    @staticmethod
    def in_training(subject: str, chain: Chain) -> bool:
        """Whether the composition occurs for this subject (three fifths)."""
        return share_of("chain", subject, chain.name) < 0.6


class Writer:
    """Samples documents from a world; all randomness comes from the generator passed to each method."""

    def __init__(self, world: World, *, late: bool = False) -> None:
        self.world = world
        self._late = late
        self._subjects = list(world.by_subject)
        self._weights = [max(3, len(facts)) for facts in world.by_subject.values()]
        self._with_questions = [fact for fact in world.facts if Split.has_questions(fact)]
        self._episode = [fact for fact in world.facts if Split.in_episodes(fact)]
        self._chains: dict[str, list[tuple[Chain, str]]] = {}
        for subject, chain, answer in world.chain_facts():
            if Split.in_training(subject, chain):
                self._chains.setdefault(subject, []).append((chain, answer))
        self._neutral = neutral_parts()
        self._people = [e.name for e in world.entities.values() if e.type == "person"]

    def documents(self, rng: random.Random, mix: Mapping[str, float] = FIRST) -> Iterator[Document]:
        """Yield documents without end, with the kinds in the proportions of ``mix``."""
        kinds = list(mix)
        odds = [mix[kind] / _LENGTH[kind] for kind in kinds]
        while True:
            kind = rng.choices(kinds, odds)[0]
            yield getattr(self, kind)(rng)

    def wordings(self, relation: str) -> tuple[str, ...]:
        """Return the phrasings of a relation that this part of the training text uses."""
        entry = self.world.relations[relation]
        return (*entry.phrasings, *entry.later) if self._late else entry.phrasings

    def state(self, fact: Fact, rng: random.Random, name: str | None = None) -> str:
        """Write a fact as a sentence, in a phrasing of the training text."""
        phrasing = rng.choice(self.wordings(fact.relation))
        return f"{sentence(phrasing, name or fact.subject)} {fact.object}."

    def biography(self, rng: random.Random) -> Document:
        """Write 3-8 sentences about one subject."""
        subject = rng.choices(self._subjects, self._weights)[0]
        facts = list(self.world.by_subject[subject])
        rng.shuffle(facts)
        length = rng.randint(3, 8)
        while len(facts) < min(length, 4):  # short lists repeat a fact in other words
            facts.append(rng.choice(facts))
        name, alias = subject, (*self.world.names(subject), None)[1]
        lines = []
        if alias and rng.random() < ALIAS_ODDS:
            lines.append(
                rng.choice((f"{name} is also known as {alias}.", f"{alias} is another name for {name}."))
            )
            if rng.random() < 0.7:
                name = alias
        lines += [self.state(fact, rng, name) for fact in facts[:length]]
        return Document("biography", rng.choice((" ", "\n")).join(lines))

    def single(self, rng: random.Random) -> Document:
        """State one fact."""
        return Document("single", self.state(rng.choice(self.world.facts), rng))

    def question(self, rng: random.Random) -> Document:
        """Ask and answer two questions."""
        return Document(
            "question", "\n".join(self._qa(rng.choice(self._with_questions), rng) for _ in range(2))
        )

    def _qa(self, fact: Fact, rng: random.Random) -> str:
        question = rng.choice(self.world.relations[fact.relation].questions)
        return f"Question: {sentence(question, fact.subject)}\nAnswer: {fact.object}."

    def chain(self, rng: random.Random) -> Document:
        """State two compositions of facts about one subject."""
        subject = rng.choice(list(self._chains))
        chains = rng.choices(self._chains[subject], k=2)
        lines = []
        for chain, answer in chains:
            if rng.random() < 0.3:
                lines.append(f"Question: {sentence(chain.question, subject)}\nAnswer: {answer}.")
            else:
                lines.append(f"{sentence(rng.choice(chain.phrasings), subject)} {answer}.")
        return Document("chain", "\n".join(lines))

    def neutral(self, rng: random.Random) -> Document:
        """Write two or three sentences that state no fact."""
        return Document("neutral", " ".join(self.neutral_sentence(rng) for _ in range(rng.randint(2, 3))))

    def neutral_sentence(self, rng: random.Random) -> str:
        """Write one sentence that states no fact."""
        part = {key: rng.choice(options) for key, options in self._neutral.items()}
        return f"{part['openers']} {part['adjectives']} {part['nouns']} {part['verbs']}{part['tails']}."

    def episode(self, rng: random.Random) -> Document:
        """Write one to three new facts, then ask about one of them or about something else."""
        news = {(f.subject, f.relation): f for f in rng.choices(self._episode, k=rng.randint(1, 3))}
        new_facts = {key: Fact(f.subject, f.relation, self.other_object(f, rng)) for key, f in news.items()}
        prompts = [episode_line(fact, self, rng) for fact in new_facts.values()]
        if rng.random() < 0.5:
            target = rng.choice(list(new_facts.values()))
        else:
            target = self._other_fact(list(news.values()), set(new_facts), rng)
        return episode_document(prompts, target, self, rng)

    def dialogue(self, rng: random.Random) -> Document:
        """Write one to three new facts, then ask three to six times, about them and about others."""
        if rng.random() < STRANGERS:
            new = [self._strange(rng) for _ in range(rng.randint(1, 3))]
            true: list[Fact] = []
        else:
            true = rng.choices(self._episode, k=rng.randint(1, 3))
            new = [Fact(f.subject, f.relation, self.other_object(f, rng)) for f in true]
        return self._conversation("dialogue", new, true, 0.5, rng)

    def contrast(self, rng: random.Random) -> Document:
        """Write one to three new facts, then ask three to six times, mostly for facts they do not change."""
        true = rng.choices(self._episode, k=rng.randint(1, 3))
        new = {(f.subject, f.relation): Fact(f.subject, f.relation, self.other_object(f, rng)) for f in true}
        return self._conversation("contrast", list(new.values()), true, 0.35, rng)

    def _conversation(
        self, kind: str, new: list[Fact], true: list[Fact], share: float, rng: random.Random
    ) -> Document:
        """State new facts, then ask for them with probability ``share``, else for facts they do not change.

        ``true``: the facts they replace; if empty, only the new facts are asked for.
        """
        by_key = {(f.subject, f.relation): f for f in new}
        text = "\n".join(episode_line(fact, self, rng) for fact in by_key.values())
        loss_spans = []
        for _ in range(rng.randint(3, 6)):
            if rng.random() < share or not true:
                target = rng.choice(list(by_key.values()))
            else:
                target = self._other_fact(true, set(by_key), rng)
            text += "\n" + episode_question(target, self, rng)
            start = len(text)
            text += f" {target.object}."
            loss_spans.append((start, len(text)))
        return Document(kind, text, tuple(loss_spans))

    def drill(self, rng: random.Random) -> Document:
        """Write one to three facts about people outside the world, then repeat or ask for them four to eight times."""
        facts = {(f.subject, f.relation): f for f in (self._strange(rng) for _ in range(rng.randint(1, 3)))}
        lines = [(fact, self.state(fact, rng)) for fact in facts.values()]
        text = "\n".join(f"New fact: {line}" for _, line in lines)
        loss_spans = []
        for _ in range(rng.randint(4, 8)):
            fact, line = rng.choice(lines)
            text += "\n"
            start = len(text)
            if rng.random() < 0.4:
                text += line
            else:
                text += episode_question(fact, self, rng)
                start = len(text)
                text += f" {fact.object}."
            loss_spans.append((start, len(text)))
        return Document("drill", text, tuple(loss_spans))

    def _strange(self, rng: random.Random) -> Fact:
        """Invent a fact about a person who is not in the world."""
        while True:
            first, last = (rng.choice(self._people).split(" ")[i] for i in (0, 1))
            if f"{first} {last}" not in self.world.entities:
                break
        relation = rng.choice([r for r in self.world.relations.values() if r.subject == "person"])
        return Fact(f"{first} {last}", relation.name, rng.choice(self.world.objects(relation.name)))

    def other_object(self, fact: Fact, rng: random.Random) -> str:
        """Pick an object of the same relation that is not the true one."""
        options = self.world.objects(fact.relation)
        while True:
            other = rng.choice(options)
            if other not in (fact.object, fact.subject):
                return other

    def _other_fact(self, news: list[Fact], excluded: set[tuple[str, str]], rng: random.Random) -> Fact:
        """Pick a fact that no new fact replaces: same subject, same relation, or any."""
        near = rng.choice(news)
        pools = (
            [f for f in self.world.by_subject[near.subject] if Split.in_episodes(f)],
            self.world.by_relation[near.relation],
            self._episode,
        )
        while True:
            pool = rng.choice(pools)
            fact = rng.choice(pool) if pool else rng.choice(self._episode)
            if (fact.subject, fact.relation) not in excluded and Split.in_episodes(fact):
                return fact


def episode_line(fact: Fact, writer: Writer, rng: random.Random) -> str:
    """Write a line that states a new fact."""
    return f"New fact: {writer.state(fact, rng)}"


def episode_question(fact: Fact, writer: Writer, rng: random.Random) -> str:
    """Ask for a fact, by a question or by a sentence to complete."""
    relation = writer.world.relations[fact.relation]
    if rng.random() < 0.6:
        return f"Question: {sentence(rng.choice(relation.questions), fact.subject)}\nAnswer:"
    return sentence(rng.choice(writer.wordings(fact.relation)), fact.subject)


def episode_document(lines: list[str], fact: Fact, writer: Writer, rng: random.Random) -> Document:
    """Append a question, or a sentence to complete, to new facts; only its answer has loss."""
    head = "\n".join([*lines, episode_question(fact, writer, rng)])
    text = f"{head} {fact.object}."
    return Document("episode", text, ((len(head), len(text)),))
