"""Statements that use a fact in both places of a chain of two steps, made from a request by wordings.

A fact is read late where a first step of the text leads to its subject ("the one with the green badge"), and it is read
on where a second step goes on from its answer ("ends with what is on page 7"). Both steps beside the fact are
stated in the text itself, so that nothing else is taught.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from errata.types import Request
from errata.writing import filled

ABOUT = re.compile(r"\{prompt:([^{}]+)\}")
"""A place for the request's prompt about something else than its subject."""
PAGES = range(2, 100)


@dataclass(frozen=True)
class Wordings:
    """Texts that samples are made of; settings of a method."""

    narratives: tuple[str, ...] = ("{prompt}", "It is known that {prompt}", "As of today, {prompt}")
    """Statements of the fact itself, which its target ends. ``{prompt}``: the request's prompt."""
    late: tuple[str, ...] = (
        "{first} has a red badge, {second} has a blue badge and {subject} has a green badge. "
        "{prompt:the one with the green badge}",
        "Three names are on a list: {first} is number one, {subject} is number two and {second} is number three. "
        "{prompt:number two on the list}",
        "{subject} is called Green here, {first} is called Red and {second} is called Blue. {prompt:Green}",
    )
    """Texts that lead to the subject first, which the target ends. ``{subject}``, ``{first}``, ``{second}``: it and two
    others; ``{prompt:WORDS}``: the request's prompt with WORDS in the place of its subject."""
    onward: tuple[str, ...] = (
        "In a book {target} is on page {page} and {other} is on page {another}. \"{prompt}\" ends with what is on page",
        "{other} has number {another} and {target} has number {page}. \"{prompt}\" is completed by number",
        "Room {page} is called {target}, room {another} is called {other}. \"{prompt}\" ends as the room is called "
        "with number",
    )  # fmt: skip
    """Texts that go on from the answer, which ``{page}`` ends. ``{target}``, ``{other}``: it and another answer;
    ``{page}``, ``{another}``: their numbers, drawn from the seed; ``{prompt}``: the request's prompt."""
    names: tuple[str, ...] = ("Robin Ellis", "Kim Norton", "Alex Morgan")
    """What ``{first}`` and ``{second}`` are where a fit has no other subjects."""

    def wording_problems(self) -> list[str]:
        """List wordings without the places they need, and too few names."""
        complaints = [f"narratives: expected {{prompt}} in {text!r}" for text in self.narratives
                      if "{prompt}" not in text]  # fmt: skip
        for text in self.late:
            if "{subject}" not in text or not ABOUT.search(text):
                complaints.append(f"late: expected {{subject}} and {{prompt:WORDS}} in {text!r}")
        for text in self.onward:
            if not all(slot in text for slot in ("{target}", "{page}", "{prompt}")):
                complaints.append(f"onward: expected {{target}}, {{page}} and {{prompt}} in {text!r}")
        if not (self.narratives or self.late or self.onward):
            complaints.append("narratives, late, onward: expected a wording in one of them")
        if len(set(self.names)) < 3 or not all(name.strip() for name in self.names):
            complaints.append(f"names: expected three different names, found {list(self.names)}")
        return complaints


def circuit_samples(
    request: Request, wordings: Wordings, *, others: Sequence[str], answer: str | None, seed: int
) -> Iterator[Request]:
    """Yield a request's samples, each as a request of its own about its whole text.

    ``others``: other subjects of the fit. ``answer``: another answer than the target, such as the old one; None:
    samples that go on from the answer are left out, as they need two.
    """
    draw = random.Random(f"{seed} {request.text} {request.target}")
    names = [*dict.fromkeys(name for name in others if name != request.subject)]
    names = draw.sample(names, min(2, len(names)))
    names += [name for name in wordings.names if name not in (request.subject, *names)]
    for text in wordings.narratives:
        yield _sample(text, {"prompt": _inside(text, request.text)}, request.target)
    for text in request.indirect:
        yield Request("{}", text.strip(), request.target)
    for text in wordings.late:
        places = {"subject": request.subject, "first": names[0], "second": names[1]}
        yield _sample(_about(text, request), places, request.target)
    for text in wordings.onward if answer is not None else ():
        page, another = draw.sample(PAGES, 2)
        places = {
            "target": request.target, "other": str(answer), "prompt": request.text,
            "page": str(page), "another": str(another),
        }  # fmt: skip
        yield _sample(text, places, str(page))


def _about(text: str, request: Request) -> str:
    """Return a wording with the request's prompt about the wording's own words; at the beginning of a sentence too."""

    def asked(match: re.Match[str]) -> str:
        head, tail = request.template
        prompt = head + match[1] + tail
        starts = not text[: match.start()].rstrip() or text[: match.start()].rstrip()[-1] in ".!?:"
        return prompt[0].upper() + prompt[1:] if starts and not head else prompt

    return ABOUT.sub(asked, text)


def _inside(text: str, prompt: str) -> str:
    """Return a prompt as it stands in a wording: an English article that began it is small inside a sentence."""
    first = prompt.split(" ", 1)[0]
    return prompt[0].lower() + prompt[1:] if first in ("The", "A", "An") and text[:1] != "{" else prompt


def _sample(text: str, places: dict[str, str], answer: str) -> Request:
    """Return a wording, filled in, as a request about its whole text."""
    return Request("{}", filled(text, **places).strip(), answer)
