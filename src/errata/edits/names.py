"""Which of many phrases a text names, looked up by their first words rather than one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from errata.writing import folded, is_unspaced, names


class NameTable:
    """Phrases by their first word: a lookup takes as long as the text has words, however many phrases there are."""

    def __init__(self, phrases: Sequence[str]) -> None:
        """Take the phrases; an empty one is never named."""
        self._folded = [folded(phrase) for phrase in phrases]
        self._by_word: dict[str, list[int]] = {}
        self._without_words: list[int] = []
        for number, phrase in enumerate(self._folded):
            word = next(_words(phrase), None)
            if word is not None:
                self._by_word.setdefault(word, []).append(number)
            elif phrase:
                self._without_words.append(number)

    def named(self, text: str) -> list[int]:
        """Return the numbers of the phrases that :func:`errata.writing.names` finds in a text, ascending."""
        text = folded(text)
        candidates = [number for word in set(_words(text)) for number in self._by_word.get(word, ())]
        return sorted(n for n in (*candidates, *self._without_words) if names(text, self._folded[n]))

    def length(self, number: int) -> int:
        """Return the number of characters of a phrase, folded."""
        return len(self._folded[number])


def _words(text: str) -> Iterator[str]:
    """Yield the runs of letters and digits of scripts with spaces: a phrase is named only where its runs are whole."""
    for is_word, run in groupby(text, lambda c: (c.isalnum() or c == "_") and not is_unspaced(c)):
        if is_word:
            yield "".join(run)
