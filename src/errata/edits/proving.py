"""Answers that rest on beliefs: a model's own answer and those by texts found, the one with the best proof is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import regex

from errata.edits.routers.edit_distance import query_key
from errata.linalg.proofs import Believed, believe
from errata.writing import TERMINAL, filled, joint

TEMPLATES = ("premises", "verify", "entails", "answer", "yes", "no")
"""What the model is asked: for premises, whether a statement is true, whether premises entail it; and the prompt with
the text that its answer rests on; ``yes`` and ``no`` are the answers."""
MARK = "-"
"""Begins the line of a premise."""
_AFTER_SENTENCE = regex.compile(rf"(?<=[{TERMINAL}])\s")


@dataclass
class Prover:
    """A model with beliefs that are given, and memory of what it was asked about one prompt."""

    templates: Mapping[str, str]
    tokens: int
    depth: int
    least: float
    search: Callable[[str], Sequence[str]]
    generate: Callable[[str, int], str]
    prefer: Callable[[str, str, str], float]
    """Returns the probability of the first of two answers to a text."""
    fits: Callable[[str], bool]
    _beliefs: dict[str, float] = field(default_factory=dict[str, float])
    _found: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def answer(self, prompt: str) -> str:
        """Return the text that the model continues in place of a prompt.

        Each text found gives an option, the model's answer to ``answer`` with it; the prompt alone gives another one.
        The option whose statement, prompt and answer, is believed the most is given; of equal ones the best text's.
        """
        texts = [prompt, *(self._fill("answer", texts=text, prompt=prompt) for text in self.found(prompt))]
        texts = [text for text in texts if self.fits(text)]
        best, score = prompt, -1.0
        for text in texts:
            line = next(iter(self.generate(text, self.tokens).strip().splitlines()), "")
            option = _AFTER_SENTENCE.split(line, maxsplit=1)[0].strip()
            if not option:
                continue
            believed = self.believed(joint(prompt, option)[0])
            if believed.score >= score:
                best, score = text, believed.score
        return best

    def believed(self, statement: str) -> Believed:
        """Return how far a statement is believed, with its proof."""
        return believe(
            statement, self.direct, self.propose, self.entails, depth=self.depth, least=self.least, key=query_key
        )  # fmt: skip

    def found(self, text: str) -> list[str]:
        """Return the given beliefs for a text, the best last."""
        if text not in self._found:
            self._found[text] = list(self.search(text))
        return self._found[text]

    def direct(self, statement: str) -> float:
        """Return s_d: 1 for a given belief, else the probability that the model calls the statement true."""
        key = query_key(statement)
        if key not in self._beliefs:
            given = any(query_key(text) == key for text in self.found(statement))
            self._beliefs[key] = 1.0 if given else self._ask("verify", self.found(statement), statement)
        return self._beliefs[key]

    def propose(self, statement: str) -> list[tuple[str, ...]]:
        """Return sets of premises that the model writes: freely, and with each belief found as the first one."""
        asked = self._fill("premises", text=statement)
        proposals: list[tuple[str, ...]] = []
        for first in ((), *((text.strip(),) for text in reversed(self.found(statement)))):
            start = asked + "".join(f"\n{MARK} {premise}" for premise in first) + f"\n{MARK}"
            if self.fits(start):
                premises = (*first, *_premises(f"{MARK}{self.generate(start, self.tokens)}"))
                proposals += [premises] if premises else []
        return list(dict.fromkeys(proposals))

    def entails(self, premises: Sequence[str], statement: str) -> float:
        """Return s_e: the probability that the model says that premises entail a statement."""
        return self._ask("entails", premises, statement)

    def _ask(self, name: str, texts: Sequence[str], statement: str) -> float:
        lines = "".join(f"{MARK} {text.strip()}\n" for text in texts)
        asked = self._fill(name, texts=lines, text=statement)
        return self.prefer(asked, self.templates["yes"], self.templates["no"]) if self.fits(asked) else 0.0

    def _fill(self, name: str, **texts: str) -> str:
        return filled(self.templates[name], **texts)


def _premises(text: str) -> list[str]:
    """Return the premises at the beginning of a text, one for each line that begins with the mark."""
    premises: list[str] = []
    for line in text.splitlines():
        if not line.startswith(MARK):
            break
        premise = line.removeprefix(MARK).strip()
        premises += [premise] if premise else []
    return premises
