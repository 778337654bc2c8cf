"""The lab's text for models that answer a prompt rather than continue a text: examples, and batches of them.

An example is a prompt and its answer. An encoder-decoder reads the prompt and writes the answer; a masked model reads
both, with masks in the place of the answer's tokens, those before some token of it filled in: what it is asked when an
answer is scored from left to right. Prompts are those of the lab's cases: sentences to complete, and questions as
``Question: ...\\nAnswer:``. Held-out phrasings, and the subjects, chains and facts that :class:`errata.lab.text.Split`
leaves out, are left out here too.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from errata.lab.text import Split, Writer
from errata.lab.world import Fact, sentence

ASKED = {"statement": 0.77, "question": 0.11, "chain": 0.09, "alias": 0.03}
"""Share of each kind of example: facts as sentences to complete, as questions, compositions, other names."""
ALIAS_ODDS = 0.25
"""Share of the statements and questions about a subject with another name that use that name."""
PREFIX_ODDS = 0.05
"""Share of examples behind a sentence that states no fact."""
STOP_ODDS = 0.3
"""Share of a masked model's examples in which a full stop follows the answer."""
GAP_ODDS = 0.15
"""Share of a masked model's examples in which any of the words are masked, not the answer's alone."""
GAPS = 0.2
"""Share of the tokens that are masked in those."""

STAGES = ((600, 1 / 16), (1_800, 1 / 4))
"""Until which step only a share of the subjects is asked about, and the share. With all subjects from the start, 3,000
steps taught a model which objects a relation has and no fact: what finds a fact by its subject forms on few subjects,
each seen often, and then takes up the others."""


@dataclass(frozen=True)
class Example:
    """A prompt with its answer."""

    kind: str
    prompt: str
    answer: str


class Asker:
    """Draws examples from a writer's world; all randomness comes from the generator passed to each method."""

    def __init__(self, writer: Writer, step: int | None = None) -> None:
        """Take the subjects that are asked about from a step on, see :data:`STAGES`; None: all."""
        self.writer, self.world = writer, writer.world
        share = 1.0 if step is None else next((share for until, share in STAGES if step < until), 1.0)
        self.facts = [fact for fact in self.world.facts if Split.is_early(fact.subject, share)]
        self._with_questions = [fact for fact in self.facts if Split.has_questions(fact)]
        self._chains = [
            (subject, chain, answer)
            for subject, chain, answer in self.world.chain_facts()
            if Split.in_training(subject, chain) and Split.is_early(subject, share)
        ]
        entities = (entity for entity in self.world.entities.values() if entity.aliases)
        self._aliased = [entity for entity in entities if Split.is_early(entity.name, share)]

    def examples(self, count: int, rng: random.Random) -> list[Example]:
        """Draw examples, in the proportions of :data:`ASKED`; no fact is asked twice before all were asked."""
        drawn: list[Example] = []
        for kind, share in ASKED.items():
            number = count - len(drawn) if kind == "alias" else round(share * count)
            drawn += getattr(self, kind)(number, rng)
        drawn = [self._prefixed(one, rng) if rng.random() < PREFIX_ODDS else one for one in drawn]
        rng.shuffle(drawn)
        return drawn

    def statement(self, count: int, rng: random.Random) -> list[Example]:
        """Draw facts as sentences to complete."""
        drawn = []
        for fact in _in_turn(self.facts, count, rng):
            relation = self.world.relations[fact.relation]
            wording = rng.choice((*relation.phrasings, *relation.later))
            drawn.append(Example("statement", sentence(wording, self._name(fact, rng)), fact.object))
        return drawn

    def question(self, count: int, rng: random.Random) -> list[Example]:
        """Draw facts as questions."""
        drawn = []
        for fact in _in_turn(self._with_questions, count, rng):
            wording = rng.choice(self.world.relations[fact.relation].questions)
            drawn.append(
                Example("question", as_question(sentence(wording, self._name(fact, rng))), fact.object)
            )
        return drawn

    def chain(self, count: int, rng: random.Random) -> list[Example]:
        """Draw compositions of facts, three in ten as questions."""
        drawn = []
        for subject, chain, answer in _in_turn(self._chains, count, rng):
            if rng.random() < 0.3:
                drawn.append(Example("chain", as_question(sentence(chain.question, subject)), answer))
            else:
                drawn.append(Example("chain", sentence(rng.choice(chain.phrasings), subject), answer))
        return drawn

    def alias(self, count: int, rng: random.Random) -> list[Example]:
        """Draw other names of entities, either way round."""
        drawn = []
        for entity in _in_turn(self._aliased, count, rng):
            name, other = entity.name, entity.aliases[0]
            pair = rng.choice(((f"{name} is also known as", other), (f"{other} is another name for", name)))
            drawn.append(Example("alias", *pair))
        return drawn

    def _name(self, fact: Fact, rng: random.Random) -> str:
        others = self.world.names(fact.subject)[1:]
        return rng.choice(others) if others and rng.random() < ALIAS_ODDS else fact.subject

    def _prefixed(self, one: Example, rng: random.Random) -> Example:
        return Example(one.kind, f"{self.writer.neutral_sentence(rng)} {one.prompt}", one.answer)


def as_question(text: str) -> str:
    """Put a question into the lab's form."""
    return f"Question: {text}\nAnswer:"


def _in_turn(items: Sequence[Any], count: int, rng: random.Random) -> Iterator[Any]:
    """Yield items in a new order each time all of them were yielded."""
    while count > 0:
        yield from rng.sample(items, min(count, len(items)))
        count -= len(items)


def asked_batches(
    asker: Asker, tokenizer: Any, rng: random.Random, *, steps: int, rows: int, masked: bool
) -> list[dict[str, Tensor]]:
    """Draw the batches of so many steps, ``rows`` examples each, as arguments of the model's forward, with labels.

    ``masked``: for a masked model, else for an encoder-decoder.

    Examples of like length are in one batch, so that little is padded; batches come in random order.
    """
    examples = asker.examples(steps * rows, rng)
    made = _masked(examples, tokenizer, rng) if masked else _pairs(examples, tokenizer)
    made.sort(key=lambda row: len(row[0]))
    groups = [made[at : at + rows] for at in range(0, len(made), rows)]
    rng.shuffle(groups)
    pad = tokenizer.pad_token_id
    return [
        {
            "input_ids": _padded((ids for ids, _ in group), pad),
            "attention_mask": _padded(([1] * len(ids) for ids, _ in group), 0),
            "labels": _padded((labels for _, labels in group), -100),
        }
        for group in groups
    ]


def _pairs(examples: Sequence[Example], tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return what an encoder reads and what a decoder is to write, each closed by the end token."""
    sources = tokenizer([one.prompt for one in examples])["input_ids"]
    answers = tokenizer(text_target=[one.answer for one in examples])["input_ids"]
    return list(zip(sources, answers, strict=True))


def _masked(
    examples: Sequence[Example], tokenizer: Any, rng: random.Random
) -> list[tuple[list[int], list[int]]]:
    """Return what a masked model reads and the tokens behind its masks, -100 elsewhere."""
    texts = [f"{one.prompt} {one.answer}{'.' if rng.random() < STOP_ODDS else ''}" for one in examples]
    encoded = tokenizer(texts, return_offsets_mapping=True)
    rows = []
    for one, ids, offsets in zip(examples, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if rng.random() < GAP_ODDS:
            inside = [i for i, (a, b) in enumerate(offsets) if a < b]
            hidden = {i for i in inside if rng.random() < GAPS} or {rng.choice(inside)}
        else:
            start, stop = len(one.prompt) + 1, len(one.prompt) + 1 + len(one.answer)
            places = [i for i, (a, b) in enumerate(offsets) if a < b and a < stop and b > start]
            hidden = set(places[rng.randrange(len(places)) :])
        rows.append(
            (
                [tokenizer.mask_token_id if i in hidden else token for i, token in enumerate(ids)],
                [token if i in hidden else -100 for i, token in enumerate(ids)],
            )
        )
    return rows


def _padded(rows: Iterable[Sequence[int]], fill: int) -> Tensor:
    lists = [list(row) for row in rows]
    longest = max(map(len, lists))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in lists])
