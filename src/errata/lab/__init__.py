"""The lab: a synthetic world whose facts are all known, and a small model trained on it. Works offline."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.lab.cases import case_of, cases, neutral_texts
from errata.lab.world import World, default_world

if TYPE_CHECKING:
    from errata.host.load import Host
    from errata.stats.collect import Corpus

NAME = "lab"

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
    from errata.host.load import load as open_host

    return open_host(folder(), device=device, dtype=dtype, name=NAME)


def card() -> dict[str, Any]:
    """Return the model card of the shipped model: data, size, training, recall, layer test."""
    return json.loads((folder() / "card.json").read_text(encoding="utf-8"))


def corpus(documents: int = 4000) -> Corpus:
    """Return a sample of text like the model's training text, for statistics."""
    import itertools
    import random

    from errata.lab.text import Writer
    from errata.stats.collect import Corpus

    def texts() -> Iterable[str]:
        stream = Writer(default_world()).documents(random.Random("errata-statistics"))
        return (document.text for document in itertools.islice(stream, documents))

    return Corpus(f"lab text, world {default_world().seed}, {documents} documents", texts)
