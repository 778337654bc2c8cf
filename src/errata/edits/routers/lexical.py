"""An entry acts on prompts that name it: its subject, whole words, whatever their capitals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import Question, Router
from errata.writing import folded, names


@dataclass(frozen=True, eq=False)
class Lexical(Router):
    """Accepts rows whose prompt names an entry; of several the longest name, of equal ones the newest entry."""

    name: ClassVar[str] = "lexical"
    phrases: tuple[str, ...]
    """By entry, the name that a prompt must contain."""

    def scores(self, question: Question) -> Tensor:
        """Return the length of the name where the prompt contains it, else 0, ``[rows, entries]``."""
        texts = [folded(text) for text in question.texts()]
        newest = len(self.phrases) + 1
        table = [
            [
                len(phrase) + (number + 1) / newest if names(text, folded(phrase)) else 0.0
                for number, phrase in enumerate(self.phrases)
            ]
            for text in texts
        ]
        return torch.tensor(table, dtype=torch.float32, device=question.inputs.device).reshape(
            len(texts), len(self.phrases)
        )


ROUTER = Lexical
