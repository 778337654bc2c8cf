"""Texts ranked by their words: BM25+, the baseline that training-data attribution has to beat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import regex
import torch
from torch import Tensor

K1, B, DELTA = 1.5, 0.75, 1.0
"""Saturation of a word's count, weight of a text's length, and what any occurrence counts at least."""
_WORD = regex.compile(r"[\p{L}\p{N}]+")


def words(text: str) -> list[str]:
    """Return the words of a text in small letters."""
    return _WORD.findall(text.lower())


class WordIndex:
    """Word counts of some texts, for BM25+ (Lv and Zhai, CIKM 2011)."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        lengths = [sum(count.values()) for count in counts]
        mean = sum(lengths) / max(1, len(lengths)) or 1.0
        self.size = len(texts)
        self._weights: dict[str, list[tuple[int, float]]] = {}
        for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for word, times in count.items():
                saturated = times * (K1 + 1) / (times + K1 * (1 - B + B * length / mean))
                self._weights.setdefault(word, []).append((i, saturated + DELTA))

    def scores(self, query: str) -> Tensor:
        """Return the score of each text for the words of a query, float64 ``[n]``; 0 where they share none."""
        result = torch.zeros(self.size, dtype=torch.float64)
        for word, times in Counter(words(query)).items():
            entries = self._weights.get(word, [])
            rarity = math.log((self.size + 1) / len(entries)) if entries else 0.0
            for i, weight in entries:
                result[i] += times * rarity * weight
        return result
