"""Edits that change no weight and prepend a text to prompts that a router accepts: in-context editing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.edits import header as fields
from errata.edits.edit import Provenance
from errata.edits.routers import _stored
from errata.edits.routers._router import NONE, Question, Router
from errata.edits.runtime import RuntimeEdit
from errata.errors import EditError
from errata.host import placed
from errata.host.base import ModelHost

TEXT_ROUTERS = ("always", "lexical")
"""Routers that decide by a prompt's text alone, before the model runs."""


@dataclass(frozen=True, eq=False)
class PromptEdit(RuntimeEdit):
    """Texts, one of which may be prepended to a prompt; a router selects it."""

    kind: ClassVar[str] = "prompt"

    contexts: tuple[str, ...]
    """By entry, the text to prepend; empty: prompts are not changed."""
    router: Router
    """Decides by the prompt's text."""
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.router.name not in TEXT_ROUTERS:
            raise EditError(
                f"a {self.router.name} router needs the model's hidden states, and a prompt edit decides before the "
                f"model runs; expected {' or '.join(TEXT_ROUTERS)}"
            )

    def rewrite(self, prompt: str) -> str:
        """Return the prompt with the text of its entry prepended; the prompt itself if no entry is selected."""
        if not self.contexts:
            return prompt
        entry = int(self.router.decide(Question(torch.zeros(1, 0), torch.zeros(1, 0), lambda: [prompt])))
        return prompt if entry == NONE else self.contexts[entry] + prompt

    def parts(self) -> Mapping[str, Tensor]:
        """Return the router's tensors ``[entries, ...]``."""
        return _stored.parts_of(self.router)

    def body(self) -> Mapping[str, Any]:
        """Return the texts and the router's settings."""
        return {
            "contexts": list(self.contexts),
            "router": _stored.body_of(self.router),
        }

    @property
    def size(self) -> int:
        """Bytes of all texts and tensors."""
        return super().size + sum(len(text.encode()) for text in self.contexts)

    @classmethod
    def restore(
        cls, parts: Mapping[str, Tensor], body: Mapping[str, Any], provenance: Provenance
    ) -> PromptEdit:
        """Build the edit from its file's tensors, the router's ``[entries, ...]``, and header.

        Raises ValueError or KeyError where they do not fit.
        """
        router = _stored.restore(parts, body)
        return cls(fields.get_texts(body, "contexts", "the header"), router, provenance)

    def _check(self, host: ModelHost) -> None:
        if host.tokenizer is None:
            raise EditError(f"{host.name} reads no text, so there are no prompts to change")

    def _attach(self, host: ModelHost, number: int | None) -> None:
        placed.add_rewriter(host.model, placed.Rewriter(self.digest, self.order, self.rewrite, number))

    def summary(self) -> dict[str, Any]:
        """Describe the edit: provenance, how many texts there are and what decides."""
        return {**super().summary(), "entries": len(self.contexts), "router": self.router.name}
