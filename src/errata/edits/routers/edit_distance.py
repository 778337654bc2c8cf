"""The entry whose key is the fewest edits away from the prompt: insertions, deletions and substitutions of characters.

Source     Madaan et al., "Memory-assisted prompt editing to improve GPT-3 after deployment", EMNLP 2022, arXiv
           2201.06009, whose code takes the closest key by Levenshtein distance; the distance by Hyyrö, "A bit-vector
           algorithm for computing Levenshtein and Damerau edit distances", Nordic Journal of Computing 10, 2003
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import regex
import torch
from torch import Tensor

from errata.edits.routers._router import Question, Reading, Router
from errata.writing import folded

_MARKED = regex.compile(r"<[^<>]*>")
_OTHER = regex.compile(r"[^\p{L}\p{M}\p{N}\s]")


@dataclass(frozen=True, eq=False)
class EditDistance(Router):
    """Accepts rows whose prompt is more similar to a key than the threshold, both in the form of :func:`query_key`.

    The similarity of two texts is 1 - edits / characters of the longer one, or with ``absolute`` minus the edits.
    """

    name: ClassVar[str] = "edit_distance"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text"})
    per_entry: ClassVar[tuple[str, ...] | None] = ("keys",)
    keys: tuple[str, ...]
    """By entry, the text that prompts are compared with."""
    threshold: float = 0.7
    """Similarity that must be exceeded."""
    absolute: bool = False
    """Whether edits are counted whatever the length of the texts."""

    @cached_property
    def normalised(self) -> tuple[str, ...]:
        """The keys as they are compared."""
        return tuple(query_key(key) for key in self.keys)

    def scores(self, question: Question) -> Tensor:
        """Return similarity less threshold, float32 ``[rows, entries]``."""
        rows = [
            [self._similarity(text, key) for key in self.normalised]
            for text in map(query_key, question.texts())
        ]
        scores = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(self.keys))
        return scores.to(question.inputs.device) - self.threshold

    def _similarity(self, text: str, key: str) -> float:
        edits = distance(text, key)
        return -float(edits) if self.absolute else 1 - edits / max(len(text), len(key), 1)


def query_key(text: str) -> str:
    """Return a query as a key: without parts in angle brackets, capitals, punctuation and repeated spaces."""
    return " ".join(_OTHER.sub("", folded(_MARKED.sub("", text))).split())


def distance(one: str, other: str) -> int:
    """Return the Levenshtein distance of two texts.

    A column of the table of distances is kept as the signs of its steps, one bit for each character of ``one``: all of
    a column is computed by a few operations on whole numbers of any length.
    """
    if not one:
        return len(other)
    places: dict[str, int] = {}
    for at, character in enumerate(one):
        places[character] = places.get(character, 0) | 1 << at
    every, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    rises, falls, edits = every, 0, len(one)
    for character in other:
        equal = places.get(character, 0)
        free = (((equal & rises) + rises) ^ rises) | equal | falls
        right_rises = falls | (every & ~(free | rises))
        right_falls = rises & free
        edits += bool(right_rises & last) - bool(right_falls & last)
        shifted = right_rises << 1 | 1
        rises = every & (right_falls << 1 | ~(free | shifted))
        falls = shifted & free & every
    return edits


ROUTER = EditDistance
