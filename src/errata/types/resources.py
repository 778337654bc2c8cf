"""Texts and examples that belong to a model: what statistics and neutral text are taken from by default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from errata.types.picture import Picture
from errata.types.text import Case


@dataclass(frozen=True)
class Corpus:
    """Texts to take statistics over, with a name that says where they come from."""

    name: str
    texts: Callable[[], Iterable[str]]
    """Makes the texts anew, in the same order each time."""


@dataclass(frozen=True)
class Gallery:
    """Texts with a picture each, to take statistics at pictures' tokens over, with a name that says where from."""

    name: str
    shown: Callable[[], Iterable[tuple[str, Picture]]]
    """Makes the texts with their pictures anew, in the same order each time; ``<image>`` is the picture's place, else
    it stands before the text."""


@dataclass(frozen=True)
class Resources:
    """What a host brings along for fits and evaluations; everything may be left out.

    Set ``host.resources`` to give a model its own, or its corpus alone with ``errata.load(..., corpus=...)``.
    """

    corpus: Corpus | None = None
    """Texts for statistics; None: text sampled from the model."""
    neutral_texts: Callable[[int], Sequence[str]] | None = None
    """Returns that many texts that no edit is about, for perplexity; None: the end of the corpus."""
    examples: Callable[[], Sequence[Case]] | None = None
    """Returns facts with their probes for methods that learn from examples; None: there are none."""
    editors: Callable[[str], Path | None] | None = None
    """Returns the file of the editor that is trained for the host by a method's name, None where there is none."""
    gallery: Gallery | None = None
    """Pictures for statistics at their tokens, of a model that reads pictures; None: there are none."""
