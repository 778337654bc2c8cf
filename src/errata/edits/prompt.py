"""Edits that leave the model as it is and put a text before prompts that a router takes: in-context editing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from errata.edits import header as fields
from errata.edits.edit import Edit, Outside, Placement, Provenance
from errata.edits.routers import _stored
from errata.edits.routers._router import NONE, Question, Router
from errata.errors import EditError
from errata.host import locking, placed
from errata.host.base import ModelHost

TEXT_ROUTERS = ("always", "lexical")
"""Routers that decide by a prompt's text alone, before the model runs."""


@dataclass(frozen=True, eq=False)
class PromptEdit(Edit):
    """Texts, of which the one that a router chooses is put before a prompt."""

    kind: ClassVar[str] = "prompt"

    contexts: tuple[str, ...]
    """By entry, what is put before a prompt; none: prompts stay as they are."""
    router: Router
    """Decides by the prompt's text."""
    provenance: Provenance

    def __post_init__(self) -> None:
        if self.router.name not in TEXT_ROUTERS:
            raise EditError(
                f"a {self.router.name} router decides by the model's states, and there are none before a prompt is "
                f"run; expected {' or '.join(TEXT_ROUTERS)}"
            )

    def rewrite(self, prompt: str) -> str:
        """Return the prompt with the text of the entry that speaks for it; the prompt itself where none does."""
        if not self.contexts:
            return prompt
        entry = int(self.router.decide(Question(torch.zeros(1, 0), torch.zeros(1, 0), lambda: [prompt])))
        return prompt if entry == NONE else self.contexts[entry] + prompt

    def parts(self) -> Mapping[str, Tensor]:
        """Return the router's tensors."""
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
        """Build the edit from its file's tensors and header. Raises ValueError or KeyError where they do not fit."""
        router = _stored.restore(parts, body)
        return cls(fields.texts(body, "contexts", "the header"), router, provenance)

    def place(
        self, host: ModelHost, *, foreign: bool = False, merge: bool | None = None, rows: str | None = None
    ) -> Placement:
        """Have prompts rewritten; weights stay as they are, so ``merge=True`` is refused.

        Raises EditError, with nothing changed, for another host, one that reads no text, or an edit that is in
        place already.
        """
        return locking.alone(host, self._place, host, foreign, merge, rows)

    def _place(self, host: ModelHost, foreign: bool, merge: bool | None, rows: str | None) -> Placement:
        if merge:
            raise EditError(f"a {self.kind} edit changes prompts and cannot be merged into weights")
        if host.tokenizer is None:
            raise EditError(f"{host.name} reads no text, so there are no prompts to change")
        overrides = self.overruled(host, foreign=foreign)
        if self.in_place(host):
            raise EditError(f"edit {self.digest} is active on this host already")
        order = (self.provenance.created, self.digest)
        number = placed.set_number(host.model, rows)
        placed.add_rewriter(host.model, placed.Rewriter(self.digest, order, self.rewrite, number))
        return Placement(self.digest, host.fingerprint, overrides=overrides, rows=rows)

    def revert_(self, host: ModelHost, *, outside: Outside = "refuse") -> None:
        """Have prompts put as they are again; ``outside`` does not matter, since no weight was changed.

        Raises EditError if the edit is not in place.
        """
        locking.alone(host, self._revert, host)

    def _revert(self, host: ModelHost) -> None:
        if not self.in_place(host):
            raise EditError(f"edit {self.digest} is not active on this host; nothing to take back")
        placed.remove(host.model, self.digest)

    def in_place(self, host: ModelHost) -> bool:
        """Whether the edit is in place on a host."""
        return self.digest in placed.on(host.model).digests

    def then(self, later: Edit, *, cumulative: bool = False) -> PromptEdit:
        """Return a fit that went on from this edit as the edit of both: it holds this one's texts already.

        Raises EditError where it does not.
        """
        if not isinstance(later, PromptEdit) or not cumulative:
            raise EditError(f"a fit that goes on from a {self.kind} edit must give one with all its texts")
        requests = (*self.provenance.requests, *later.provenance.requests)
        return replace(later, provenance=replace(later.provenance, requests=requests, parents=(self.digest,)))

    def summary(self) -> dict[str, Any]:
        """Describe the edit: provenance, how many texts there are and what decides."""
        return {**super().summary(), "entries": len(self.contexts), "router": self.router.name}
