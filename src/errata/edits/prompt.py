"""Edits that change no weight and rewrite prompts that a router accepts: in-context editing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from torch import Tensor

from errata.edits import header as fields
from errata.edits.edit import Provenance
from errata.edits.procedures import Procedure
from errata.edits.questions import check_module, check_reader, question
from errata.edits.routers import _stored
from errata.edits.routers._router import NONE, Question, Router
from errata.edits.runtime import RuntimeEdit
from errata.errors import EditError
from errata.host import passes, placed
from errata.host.base import ModelHost
from errata.host.host import Host
from errata.host.preference import preference
from errata.host.prompts import PromptFormat
from errata.types.picture import without_marks

PUT = Procedure()
ROOM = 64
"""Tokens of the window that are left for an answer."""
REMEMBERED = 4096
"""Prompts whose decision is kept while an edit is in place."""


@dataclass(frozen=True, eq=False)
class PromptEdit(RuntimeEdit):
    """Texts that a router finds for a prompt, and what is done with them; see :class:`Procedure`."""

    kind: ClassVar[str] = "prompt"

    contexts: tuple[str, ...]
    """By entry, the text; empty: prompts are not changed."""
    router: Router
    """Decides by the prompt: its text, its sentence vector, or what a module reads at its last token."""
    provenance: Provenance
    module: str = ""
    """Path of the module whose input and output the router reads; empty for a router that reads none."""
    suffixes: tuple[str, ...] = ()
    """By entry, a text behind the prompt, for ``put`` with one entry; empty: none."""
    procedure: Procedure = PUT

    def __post_init__(self) -> None:
        # texts alone are put before prompts: whoever asks need not have the pictures of the requests
        for name in ("contexts", "suffixes"):
            object.__setattr__(self, name, tuple(map(without_marks, getattr(self, name))))
        check_module(self.router, self.module)
        if self.suffixes and (len(self.suffixes) != len(self.contexts) or self.procedure != PUT):
            raise EditError("suffixes: expected one for each context, and one entry put before a prompt")

    def rewrite(self, prompt: str, host: Host | None = None) -> str:
        """Return the prompt with the texts of its entry; the prompt itself if no entry is selected.

        ``host``: reads prompts for routers that do not decide by their text alone.
        """
        if not self.contexts:
            return prompt
        if self.procedure == PUT:
            entry = int(self.router.decide(self._question(prompt, host)))
            if entry == NONE:
                return prompt
            return self.contexts[entry] + prompt + (self.suffixes[entry] if self.suffixes else "")

        def search(text: str) -> list[str]:
            return self._search(text, host)

        def generate(text: str, tokens: int) -> str:
            return _continue(host, text, tokens)

        def fits(text: str) -> bool:
            return host is None or host.window is None or len(host.encode(text).ids) + ROOM <= host.window

        def prefer(text: str, first: str, second: str) -> float:
            if host is None:
                raise EditError("this edit runs the model on prompts: place it on a host")
            return float(preference(host, [text], first, second))

        return self.procedure.run(prompt, search, generate, fits, prefer)

    def _search(self, prompt: str, host: Host | None) -> list[str]:
        """Return the texts of the entries that the router accepts, the best last, as many as the procedure takes."""
        question = self._question(prompt, host)
        if self.procedure.count == 1:
            entry = int(self.router.decide(question))
            return [] if entry == NONE else [self.contexts[entry]]
        scores = self.router.scores(question)[0]
        best = scores.topk(min(self.procedure.count, len(scores)))
        entries = [
            int(entry) for entry, score in zip(best.indices, best.values, strict=True) if float(score) > 0
        ]
        return [self.contexts[entry] for entry in reversed(entries)]

    def _question(self, prompt: str, host: Host | None) -> Question:
        return question(host, self.router, prompt, None, self.module)

    def parts(self) -> Mapping[str, Tensor]:
        """Return the router's tensors ``[entries, ...]``."""
        return _stored.parts_of(self.router)

    def body(self) -> Mapping[str, Any]:
        """Return the texts and the router's settings."""
        body: dict[str, Any] = {"contexts": list(self.contexts), "router": _stored.body_of(self.router)}
        if self.module:
            body["module"] = self.module
        if self.suffixes:
            body["suffixes"] = list(self.suffixes)
        if self.procedure != PUT:
            body["procedure"] = self.procedure.body()
        return body

    @property
    def size(self) -> int:
        """Bytes of all texts and tensors."""
        return super().size + sum(len(text.encode()) for text in (*self.contexts, *self.suffixes))

    @classmethod
    def restore(
        cls, parts: Mapping[str, Tensor], body: Mapping[str, Any], provenance: Provenance
    ) -> PromptEdit:
        """Build the edit from its file's tensors, the router's ``[entries, ...]``, and header.

        Raises ValueError or KeyError where they do not fit.
        """
        router = _stored.restore(parts, body)
        module = fields.check_type(body.get("module", ""), str, "module")
        suffixes = fields.get_texts(body, "suffixes", "the header") if "suffixes" in body else ()
        procedure = PUT
        if "procedure" in body:
            procedure = Procedure.restore(fields.get_field(body, "procedure", dict, "the header"))
        contexts = fields.get_texts(body, "contexts", "the header")
        return cls(contexts, router, provenance, module, suffixes, procedure)

    def _check(self, host: ModelHost) -> None:
        if host.tokenizer is None:
            raise EditError(f"{host.name} reads no text, so there are no prompts to change")
        check_reader(host, self.router, self.module)

    def _attach(self, host: ModelHost, number: int | None) -> None:
        reader = host if isinstance(host, Host) else None

        @lru_cache(maxsize=REMEMBERED)
        def rewrite_on(prompt: str, *_: tuple[str, ...] | tuple[int, ...]) -> str:
            return self.rewrite(prompt, reader)

        def rewrite(prompt: str) -> str:
            # what the router reads depends on the weights' edits, and on those of the row's sets
            return rewrite_on(prompt, host.placed, passes.membership())

        placed.add_rewriter(host.model, placed.Rewriter(self.digest, self.order, rewrite, number))

    def summary(self) -> dict[str, Any]:
        """Describe the edit: provenance, how many texts there are and what decides."""
        return {**super().summary(), "entries": len(self.contexts), "router": self.router.name}


def _continue(host: Host | None, text: str, tokens: int) -> str:
    """Continue a text greedily on the host without this and other rewriters; the new text only."""
    if host is None:
        raise EditError("this edit runs the model on prompts: place it on a host")
    plain = host.with_prompt_format(PromptFormat())
    with passes.without_interventions():
        return plain.generate([text], max_new_tokens=tokens, natural_stop=False)[0]
