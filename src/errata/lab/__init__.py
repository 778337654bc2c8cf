"""The lab: a synthetic world whose facts are all known, and a small model trained on it. Works offline."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.lab.cases import case_of, cases, neutral_texts
from errata.lab.world import World, default_world
from errata.types import Corpus, Resources

if TYPE_CHECKING:
    from errata.host.host import Host

NAME = "lab"
EXAMPLES, EXAMPLE_SEED = 300, 1_000_003
"""How many facts serve as examples, and the seed they are drawn with, which no measurement uses."""

__all__ = [
    "NAME",
    "World",
    "card",
    "case_of",
    "cases",
    "corpus",
    "default_world",
    "load",
    "neutral_texts",
    "resources",
    "world",
]

world = default_world


def folder() -> Path:
    """Return the folder of the shipped model. Raises HostError where the package lacks it."""
    from errata.errors import HostError

    path = Path(str(files("errata.lab") / "model"))
    if not (path / "config.json").exists():
        raise HostError(f"the lab's model is missing from {path}; train it with: errata lab train")
    return path


def load(*, device: str = "auto", dtype: str = "auto") -> Host:
    """Open the shipped model."""
    from errata.host.open import load as open_host

    host = open_host(folder(), device=device, dtype=dtype, name=NAME)
    host.resources = resources()
    return host


def resources() -> Resources:
    """Return the texts and examples of the lab's world that its model is measured and edited with."""
    return Resources(corpus(), neutral_texts, lambda: cases(EXAMPLES, seed=EXAMPLE_SEED))


def card() -> dict[str, Any]:
    """Return the model card of the shipped model: data, size, training, recall, layer test."""
    return json.loads((folder() / "card.json").read_text(encoding="utf-8"))


def corpus(documents: int = 4000) -> Corpus:
    """Return a sample of text like the model's training text, for statistics."""
    import itertools
    import random

    from errata.lab.text import Writer

    def texts() -> Iterable[str]:
        stream = Writer(default_world()).documents(random.Random("errata-statistics"))
        return (document.text for document in itertools.islice(stream, documents))

    return Corpus(f"lab text, world {default_world().seed}, {documents} documents", texts)
