"""Words and n-grams of running text, shared by the scores of fluency, collapse and long answers."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Letters of scripts that put no space between words."""
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]")
LONGEST = 40
"""Letters of the longest word; a longer one is what a host writes that got stuck."""


def words(text: str) -> list[str]:
    """Split a text into words and single marks, case kept.

    Chinese and Japanese letters stand alone, and so do those of a "word" longer than ``LONGEST``.
    """
    pieces = _WORD.findall(text)
    return [part for word in pieces for part in (word if len(word) > LONGEST else [word])]


def grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return all n-grams of a row of tokens, in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(text: str, n: int = 2) -> float:
    """Share of a text's n-grams that differ from one another, distinct-n; 1 where there is none."""
    sequences = grams(words(text), n)
    return len(set(sequences)) / len(sequences) if sequences else 1.0


def repetition(text: str, n: int = 4) -> float:
    """Share of a text's n-grams that stood in it before, in [0, 1); 0 where it is too short for one."""
    return 1.0 - distinct(text, n)
