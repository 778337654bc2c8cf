"""Probes of form ``steps``: an answer reached step by step, each sentence begun for the host, which completes it.

The prompt begins the first sentence. What the host answers ends it, and is what the next sentence is about: "Ada is
married to" -> "Ivo Marn", "Ada is married to Ivo Marn. Ivo Marn was born in" -> "Esk". The first steps are the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from errata.evaluation.metrics.matching import first_answer, first_sentence
from errata.types import Probe

SLOT = "{}"


@dataclass(frozen=True)
class Walk:
    """Where a host has got to with one probe."""

    text: str
    """Everything before its newest answer: the prompt at first, later the sentences so far and the new beginning."""
    answer: str
    """Its newest answer, as generated."""

    def next(self, step: str) -> str:
        """Return the prompt of the next step: the sentences so far, and the beginning of a new one."""
        answer = bare(self.answer)
        return f"{self.text.rstrip()} {answer}. {step.replace(SLOT, answer)}"

    @property
    def trace(self) -> str:
        """The sentences before the one that the newest answer ends."""
        return self.text


def bare(text: str) -> str:
    """Return the answer that a continuation begins with, without the end of its sentence."""
    return first_sentence(first_answer(text)).strip().rstrip(".!?。！？").strip()


def walk(
    probes: Sequence[Probe], firsts: Sequence[str], ask: Callable[[Sequence[str]], Sequence[str]]
) -> list[Walk]:
    """Go all steps of some probes from their first answers; ``ask`` continues prompts.

    A host that gives no answer to a step is not asked the next one: its answer is empty.
    """
    walks = [Walk(probe.prompt, first) for probe, first in zip(probes, firsts, strict=True)]
    for number in range(max((len(probe.steps) for probe in probes), default=0)):
        going = [i for i, probe in enumerate(probes) if number < len(probe.steps) and bare(walks[i].answer)]
        prompts = [walks[i].next(probes[i].steps[number]) for i in going]
        answers = ask(prompts) if prompts else []
        for i, prompt, answer in zip(going, prompts, answers, strict=True):
            walks[i] = Walk(prompt, answer)
        for i, probe in enumerate(probes):
            if number < len(probe.steps) and i not in going:
                walks[i] = Walk(walks[i].text, "")
    return walks
