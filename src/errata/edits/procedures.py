"""What a prompt edit does with the texts that its router finds: puts them before a prompt, or works with them first.

A procedure sees a search, the model without the edit, and templates; it returns the text that the model continues. So
one prompt may cost several generations, before its answer begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from errata.edits import header as fields
from errata.edits import proving
from errata.errors import EditError
from errata.writing import filled

Name = Literal["put", "fill", "select", "decompose", "prove"]
Search = Callable[[str], Sequence[str]]
"""Returns the texts found for a prompt, the best last; none: empty."""
Generate = Callable[[str, int], str]
"""Continues a text greedily by at most so many tokens; returns the new text only."""
Prefer = Callable[[str, str, str], float]
"""Returns the probability of the first of two answers to a text, 0 to 1."""
Fits = Callable[[str], bool]
"""Whether the model's window holds a text with so much room behind it as an answer needs."""

TEMPLATES: Mapping[Name, tuple[str, ...]] = {
    "put": (),
    "fill": ("prompt",),
    "select": ("select", "answer"),
    "decompose": ("examples", "question", "subquestion", "fact", "answer"),
    "prove": proving.TEMPLATES,
}
"""The templates that each procedure takes."""


@dataclass(frozen=True)
class Procedure:
    """How the texts found are used.

    put        before the prompt, the best next to it
    fill       in a template with the prompt
    select     the model first writes the one sentence of them that the prompt needs, or "none"
    decompose  the model splits a question; the best text for each part is put where it asks for it
    prove      the model answers with and without each text; the answer with the best proof is given

    Texts found that the window does not hold are left out, the best last; a prompt is not changed where the window does
    not hold what the model is asked first.
    """

    name: Name = "put"
    count: int = 1
    """Texts that are found at most, for a prompt or a part of one."""
    templates: Mapping[str, str] = field(default_factory=dict[str, str])
    """By name, see :data:`TEMPLATES`; ``{texts}``, ``{text}`` and ``{prompt}`` are filled in."""
    tokens: int = 50
    """New tokens of a generation at most."""
    hops: int = 4
    """Parts of a question at most; steps of a proof."""
    least: float = 0.5
    """Belief below which a statement is no premise of a proof, 0 to 1."""

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise EditError(f"procedure {self.name!r}, expected one of {', '.join(get_args(Name))}")
        if set(self.templates) != set(TEMPLATES[self.name]):
            raise EditError(
                f"{self.name} takes the templates {', '.join(TEMPLATES[self.name]) or '(none)'}, found "
                f"{', '.join(sorted(self.templates)) or '(none)'}"
            )
        if min(self.count, self.tokens, self.hops) < 1:
            raise EditError("count, tokens and hops: expected 1 or more")

    def body(self) -> dict[str, Any]:
        """Return the procedure as plain data."""
        body: dict[str, Any] = {
            "name": self.name, "count": self.count, "templates": dict(self.templates), "tokens": self.tokens,
            "hops": self.hops,
        }  # fmt: skip
        return {**body, "least": self.least} if self.name == "prove" else body

    @staticmethod
    def restore(body: Mapping[str, Any]) -> Procedure:
        """Build a procedure from :meth:`body`. Raises ValueError or KeyError."""
        name: Any = fields.get_field(body, "name", str, "procedure")
        templates = fields.get_field(body, "templates", dict, "procedure")
        numbers = {key: fields.get_field(body, key, int, "procedure") for key in ("count", "tokens", "hops")}
        texts = {str(key): fields.check_type(text, str, "templates") for key, text in templates.items()}
        least = fields.check_type(body.get("least", 0.5), float, "procedure")
        return Procedure(name, templates=texts, **numbers, least=least)

    def run(
        self, prompt: str, search: Search, generate: Generate, fits: Fits, prefer: Prefer | None = None
    ) -> str:
        """Return the text that the model continues in place of a prompt; ``prefer`` is needed to prove."""
        if self.name == "prove":
            if prefer is None:
                raise EditError("prove asks the model what it believes: give prefer")
            return proving.Prover(
                self.templates, self.tokens, self.hops, self.least, search, generate, prefer, fits
            ).answer(prompt)
        if self.name == "decompose":
            transcript = self._decompose(prompt, search, generate, fits)
            return transcript if fits(transcript) else prompt
        found = list(search(prompt))
        while found and not fits(self._ask(found, prompt)):
            found = found[1:]
        if not found:
            return prompt
        asked = self._ask(found, prompt)
        if self.name in ("put", "fill"):
            return asked
        sentence = next(iter(generate(asked, self.tokens).strip().splitlines()), "").strip()
        if not sentence or sentence.casefold().startswith("none"):
            return prompt
        whole = self._fill("answer", text=sentence, prompt=prompt)
        return whole if fits(whole) else prompt

    def _ask(self, found: Sequence[str], prompt: str) -> str:
        """Return the texts found with the prompt, as the model first reads them."""
        texts = "".join(found)
        if self.name == "put":
            return texts + prompt
        return self._fill("prompt" if self.name == "fill" else "select", texts=texts, prompt=prompt)

    def _fill(self, name: str, **texts: str) -> str:
        return filled(self.templates[name], **texts)

    def _decompose(self, prompt: str, search: Search, generate: Generate, fits: Fits) -> str:
        """Return the examples, the question and its parts with the texts found, up to where the answer begins.

        Lines begin with what the templates ``subquestion``, ``fact`` and ``answer`` say. A generation that neither asks
        nor answers ends the splitting.
        """
        ask, fact, answer = (self.templates[name] for name in ("subquestion", "fact", "answer"))
        transcript = self.templates["examples"] + self._fill("question", prompt=prompt)
        for _ in range(self.hops):
            if not fits(transcript):
                break
            text = generate(transcript, self.tokens).partition(fact)[0]
            before, ends, _ = text.partition(answer)
            transcript += before
            if ends:
                break
            parts = [line for line in before.splitlines() if line.startswith(ask)]
            if not parts:
                break
            found = search(parts[-1].removeprefix(ask).strip())
            if not found:
                break
            transcript = f"{transcript.rstrip()}\n{fact} {found[-1].strip()}\n"
        return f"{transcript.rstrip()}\n{answer}"
