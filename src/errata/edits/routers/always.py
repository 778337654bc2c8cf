"""Every row is in scope: the first entry acts on all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from errata.edits.routers._router import Question, Reading, Router


@dataclass(frozen=True, eq=False)
class Always(Router):
    """Accepts every row."""

    name: ClassVar[str] = "always"
    reads: ClassVar[frozenset[Reading]] = frozenset()

    def scores(self, question: Question) -> Tensor:
        """Return 1 for the one entry there is ``[rows, 1]``."""
        return torch.ones(len(question.inputs), 1, device=question.inputs.device)


ROUTER = Always
