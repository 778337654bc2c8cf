"""Names to try as the subjects of an edit: from a file, or from a tokenizer's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from errata.errors import DataError
from errata.files import read_text

MOST = 2000
"""Names that a vocabulary gives at most: those of the lowest ids, which are the most frequent."""
SHORTEST = 3
"""Fewest letters of a name from a vocabulary."""


def read_names(path: Path) -> list[str]:
    """Read one name a line, each once, in order. Raises DataError for a file that cannot be read or has none."""
    names = list(dict.fromkeys(filter(None, map(str.strip, read_text(path, DataError).splitlines()))))
    if not names:
        raise DataError(f"{path} holds no names; expected one a line")
    return names


def vocabulary_names(tokenizer: Any) -> list[str]:
    """Return the words of a vocabulary that begin with a capital and go on in small letters, most frequent first."""
    ids = sorted(tokenizer.get_vocab().values())
    texts = (tokenizer.decode([number]).strip() for number in ids)
    names = dict.fromkeys(
        text for text in texts if len(text) >= SHORTEST and text.isalpha() and text.istitle()
    )
    return list(names)[:MOST]
