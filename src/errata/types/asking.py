"""How prompts are put to a model and how long its answers may be: one record, from the command line to the model."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

MAX_NEW_TOKENS = 24
THOUGHT_TOKENS = 200
LONG_TOKENS = 512


@dataclass(frozen=True)
class AskOptions:
    """How a model is prompted. Prompt fields left at None are those of the edit in question, else of the host.

    The prompt fields are resolved and checked by :func:`errata.host.prompts.prompt_format`.
    """

    template: str | None = None
    """``raw``, ``question``, ``chat`` or ``auto``, see :class:`errata.host.prompts.PromptFormat`."""
    system: str | None = None
    """System prompt of a conversation."""
    thinking: bool | str | None = None
    """Whether the chat template lets the model think first; ``on`` and ``off`` are read too. ``forced``, of short
    answers that are evaluated: it thinks for ``thought_tokens`` at most, then its block is closed and it answers."""
    join: str | None = None
    """What comes between prompt and answer: ``auto``, ``space`` or ``none``."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Longest short answer, in tokens."""
    thought_tokens: int = THOUGHT_TOKENS
    """Longest chain of thought, in tokens."""
    long_tokens: int = LONG_TOKENS
    """Longest long-form answer, in tokens."""
    context: str = ""
    """An unrelated text before every prompt."""
    thinking_template: str | None = None
    """For ``thinking`` of evaluated short answers without a chat template: a text with ``{prompt}`` in it that leaves a
    thinking block open at its end."""
    generate: bool = True
    """Whether answers are generated at all, or given ones scored only."""

    @property
    def prompt_fields(self) -> dict[str, Any]:
        """The fields that shape prompts, those left at None included."""
        return {name: getattr(self, name) for name in ("template", "system", "thinking", "join")}

    def to_dict(self) -> dict[str, Any]:
        """Return the template, the length of short answers, and whatever else is not at its default."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        always, silent = ("max_new_tokens",), {"join": "auto"}
        return {
            name: value
            for name, (value, default) in values.items()
            if name in always or value not in (None, default, silent.get(name, default))
        }


DEFAULT_ASK = AskOptions()
"""Everything at its default."""
