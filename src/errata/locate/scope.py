"""Which prompts ask what a request states: a linear gate over a site's inputs, fitted to the host's own tables.

In scope are the request's own template and its paraphrases by the tables, with names of the subject's type; outside
are the type's other templates with the same names. So the gate knows the relation, whatever the name. Nothing here
takes a case or a probe.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from errata.host.generate import sample_rows
from errata.host.host import Host
from errata.host.layout import Site
from errata.linalg.gate import two_sided_ridge
from errata.locate.keys import Place, capture
from errata.locate.own import TOKENS, type_of
from errata.stats.tables import AnswerTable, Tables, answers, fill
from errata.stats.templates import SLOT
from errata.types import Request

RIDGE = 1.0
"""Ridge of the regression in mean squared norms of the states; chosen on the lab, seed 1."""
SAMPLES, SAMPLE_TOKENS = 16, 6
"""Continuations of a subject that are out of scope where the tables have no type for it, and their length."""


@dataclass(frozen=True)
class ScopeGate:
    """w x + b, about 1 for states x ``[d_in]`` in scope and -1 outside."""

    weight: Tensor
    """w ``[d_in]``, float32."""
    bias: float

    def __call__(self, states: Tensor) -> Tensor:
        """Return the gate's values ``[n]`` for states ``[n, d_in]``."""
        return states.to(self.weight) @ self.weight + self.bias


@dataclass
class ScopeData:
    """The states of a host's own statements at a site, read once for each type of names."""

    host: Host
    tables: Tables
    site: Site
    names: int = 8
    """Names per template."""
    seed: int = 0
    _states: dict[int, Tensor] = field(default_factory=dict[int, Tensor], repr=False)

    def gate(self, request: Request) -> ScopeGate:
        """Return the gate of a request; without tables its own prompt against what the host writes of its subject."""
        number = type_of(self.host, request, self.tables)
        if number is None:
            return _gate(self.states([request.text]), self.states(self._continuations(request)))
        table, template = self.tables.types[number], SLOT.join(request.template)
        column = table.column(template) or answers(
            self.host, [fill(template, name) for name in table.names], tokens=TOKENS
        )
        same, related = set(table.paraphrases(column)), table.related(column)
        inside = [i for i, one in enumerate(table.templates) if one in same]
        outside = [i for i, one in enumerate(table.templates) if one not in same and one not in related]
        of_type = self._of_type(number, table)
        own = self.states([request.text, *(fill(template, name) for name in self._names(table))])
        return _gate(torch.cat([own, of_type[inside].flatten(0, 1)]), of_type[outside].flatten(0, 1))

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Return the site's inputs at the last token of prompts ``[n, d_in]``, float32."""
        places = [Place(tuple(self.host.encode_prompt(prompt))) for prompt in prompts]
        return capture(self.host, places, [self.site]).keys[self.site].float()

    def _names(self, table: AnswerTable) -> list[str]:
        draw = random.Random(f"errata-scope-{self.seed}")
        return draw.sample(list(table.names), min(self.names, len(table.names)))

    def _of_type(self, number: int, table: AnswerTable) -> Tensor:
        """Return the states of all templates with all names of a type, ``[templates, names, d_in]``."""
        if number not in self._states:
            names = self._names(table)
            states = self.states([fill(template, name) for template in table.templates for name in names])
            self._states[number] = states.view(len(table.templates), len(names), -1)
        return self._states[number]

    def _continuations(self, request: Request) -> list[str]:
        digest = hashlib.sha256(f"{self.seed} {request.subject}".encode()).digest()
        start = self.host.encode_prompt(request.subject)
        texts = sample_rows(
            self.host, [start] * SAMPLES, SAMPLE_TOKENS, top_k=50, seed=int.from_bytes(digest[:4], "big")
        )
        return [request.subject, *(request.subject + text.rstrip() for text in texts)]


def _gate(inside: Tensor, outside: Tensor) -> ScopeGate:
    weight, bias = two_sided_ridge(inside.double(), outside.double(), ridge=RIDGE)
    return ScopeGate(weight.float(), bias)
