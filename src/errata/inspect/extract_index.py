"""Where a sequence of tokens occurs in a corpus: a suffix array over whole tokens that no match leaves a text of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Ids = Sequence[int]


class TokenIndex:
    """All suffixes of some texts in order. Numbers that occur once separate the texts, so no match leaves one."""

    def __init__(self, texts: Sequence[Ids]) -> None:
        """Index texts of token ids, from 0 upwards. O(n log^2 n) for n tokens."""
        parts = [np.asarray([*text, -1 - i], dtype=np.int64) for i, text in enumerate(texts)]
        self.tokens: NDArray[np.int64] = np.concatenate(parts) if parts else np.zeros(0, np.int64)
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        """Place of each text's first token."""
        self.order = _suffixes(self.tokens)

    @cached_property
    def digest(self) -> str:
        """Checksum of all texts, 16 hex digits."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()[:16]

    def _bound(self, window: Ids, *, after: bool) -> int:
        """Return how many suffixes come before all that begin with a window; ``after``: before or with it."""
        low, high, size, wanted = 0, len(self.order), len(window), list(window)
        while low < high:
            middle = (low + high) // 2
            start = int(self.order[middle])
            own = self.tokens[start : start + size].tolist()
            if own < wanted or (after and own == wanted):
                low = middle + 1
            else:
                high = middle
        return low

    def count(self, window: Ids) -> int:
        """Return how often a window occurs; two binary searches."""
        return self._bound(window, after=True) - self._bound(window, after=False)

    def places(self, window: Ids) -> list[tuple[int, int]]:
        """Return text and position of each occurrence, in order."""
        found = np.sort(self.order[self._bound(window, after=False) : self._bound(window, after=True)])
        texts = np.searchsorted(self.starts, found, side="right") - 1
        return [(int(text), int(start - self.starts[text])) for text, start in zip(texts, found, strict=True)]

    def longest(self, ids: Ids) -> int:
        """Return how many of the first tokens of ``ids`` occur together somewhere."""
        place, best = self._bound(ids, after=False), 0
        for near in (place - 1, place):
            if 0 <= near < len(self.order):
                start = int(self.order[near])
                own = self.tokens[start : start + len(ids)].tolist()
                pairs = zip(own, ids[: len(own)], strict=True)
                best = max(best, next((i for i, (a, b) in enumerate(pairs) if a != b), len(own)))
        return best

    def spans(self, ids: Ids, least: int) -> list[tuple[int, int]]:
        """Return start and stop of maximal stretches of ``ids``, ``least`` tokens or more, that occur somewhere."""
        found: list[tuple[int, int]] = []
        for start in range(len(ids) - least + 1):
            stop = start + self.longest(ids[start:])
            if stop - start >= least and (not found or stop > found[-1][1]):
                found.append((start, stop))
        return found


def _suffixes(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the starts of all suffixes in order, by doubling the length that is compared."""
    size = len(tokens)
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    order, step = np.argsort(rank, kind="stable"), 1
    while size and step < size:
        second = np.full(size, -1, np.int64)
        second[:-step] = rank[step:]
        order = np.lexsort((second, rank))
        first, last = rank[order], second[order]
        new = np.concatenate([[0], np.cumsum((first[1:] != first[:-1]) | (last[1:] != last[:-1]))])
        rank = np.empty(size, np.int64)
        rank[order] = new
        if new[-1] == size - 1:
            break
        step *= 2
    return order
