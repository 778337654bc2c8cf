"""Words and n-grams of generated text, shared by the metrics of fluency, collapse and long answers."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Letters of scripts without spaces between words."""
_WORD = re.compile(rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+|[^\w\s]")
LONGEST = 40
"""Maximum letters of a word; a longer one means that generation got stuck."""


def words(text: str) -> list[str]:
    """Split a text into words and punctuation marks, keeping case.

    Each Chinese or Japanese letter is a word, and so is each letter of a "word" longer than ``LONGEST``.
    """
    pieces = _WORD.findall(text)
    return [part for word in pieces for part in (word if len(word) > LONGEST else [word])]


def grams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """Return all n-grams of a token sequence, in order."""
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def distinct(text: str, n: int = 2) -> float:
    """Return distinct-n: the number of distinct n-grams over the number of n-grams; 1 where there is none."""
    sequences = grams(words(text), n)
    return len(set(sequences)) / len(sequences) if sequences else 1.0


def repetition(text: str, n: int = 4) -> float:
    """Return the share of n-grams that repeat an earlier one, in [0, 1); 0 for a text shorter than n."""
    return 1.0 - distinct(text, n)
