"""Whether a free answer says what it should: alias matching on greedy text.

Source: the generation protocol of "The Mirage of Model Editing" (arXiv 2502.11177), natural stop and
no length given away, with deterministic matching instead of a judge.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_FIRST_SENTENCE = re.compile(r"[.!?][\"')\]]*(\s|$)")


def normalise(text: str) -> str:
    """Fold case, width and punctuation, drop articles: ``"The  U.K."`` becomes ``"u k"``."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w\s]", " ", folded).split()
    return " ".join(word for word in words if word not in {"a", "an", "the"})


def first_answer(text: str) -> str:
    """Return the first line that holds text."""
    return next((line for line in text.splitlines() if line.strip()), "").strip()


def says(text: str, answers: Sequence[str]) -> bool:
    """Whether any answer occurs as whole words, starting within the first sentence of the text."""
    line = first_answer(text)
    end = _FIRST_SENTENCE.search(line)
    first = normalise(line[: end.start()] if end else line)
    whole = normalise(line)
    for answer in answers:
        wanted = normalise(answer)
        if not wanted:
            continue
        for match in re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", whole):
            if match.start() <= max(0, len(first) - 1):
                return True
    return False


def answered(text: str, right: Sequence[str], wrong: Sequence[str] = ()) -> bool:
    """Whether a text gives a right answer and asserts none of the wrong ones in the same sentence.

    A wrong answer that is part of a right one does not count.
    """
    if not says(text, right):
        return False
    contained = {w for w in wrong if any(says(r, [w]) for r in right)}
    return not says(text, [w for w in wrong if w not in contained])
