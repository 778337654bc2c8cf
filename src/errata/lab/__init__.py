"""The lab: a synthetic world whose facts are all known, and small models trained on it. Works offline."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.lab.cases import case_of, cases, neutral_texts, training_cases, world_of
from errata.lab.forgetting import MOST as MOST_FORGOTTEN
from errata.lab.forgetting import (
    biographies,
    cases_to_forget,
    requests_to_keep,
    strangers,
    subjects_to_forget,
)
from errata.lab.world import World, default_world
from errata.types import Corpus, Resources

if TYPE_CHECKING:
    from errata.host.host import Host

NAME, PICTURES = "lab", "lab-vl"
MODELS = {
    "lab": "model", "lab-gpt2": "model-gpt2", "lab-qwen3": "model-qwen3", "lab-t5": "model-t5",
    "lab-bert": "model-bert", "lab-vl": "model-vl",
}  # fmt: skip
"""Folders of the shipped models by their names: a Llama-shaped one, and others of the same world. ``lab-t5`` is an
encoder-decoder and ``lab-bert`` a masked language model; they answer prompts and continue no text. ``lab-vl`` is the
first with an image tower before it, see :mod:`errata.lab.vision`."""
EXAMPLES, EXAMPLE_SEED = 300, 1_000_003
"""How many facts serve as examples, and the seed they are drawn with, which no measurement uses."""

__all__ = [
    "MOST_FORGOTTEN",
    "MODELS",
    "NAME",
    "World",
    "biographies",
    "card",
    "case_of",
    "cases",
    "cases_to_forget",
    "corpus",
    "default_world",
    "editor",
    "load",
    "neutral_texts",
    "requests_to_keep",
    "resources",
    "strangers",
    "subjects_to_forget",
    "training_cases",
    "world",
    "world_of",
]

world = default_world


def folder(name: str = NAME) -> Path:
    """Return the folder of a shipped model.

    Raises ConfigError for a name that is not in ``MODELS``, HostError where the package lacks the folder.
    """
    from errata.errors import ConfigError, HostError
    from errata.registry import unknown

    if name not in MODELS:
        raise ConfigError(unknown(name, list(MODELS), "model of the lab"))
    path = Path(str(files("errata.lab") / MODELS[name]))
    if not any((path / file).exists() for file in ("config.json", "vision.json")):
        raise HostError(f"the lab's model is missing from {path}; train it with: errata lab train")
    return path


def load(name: str = NAME, *, device: str = "auto", dtype: str = "auto") -> Host:
    """Open a shipped model, one of ``MODELS``."""
    from errata.host.open import load as open_host

    model, processor = (folder(name), None) if name != PICTURES else _assembled(folder(name))
    host = open_host(model, processor, device=_place(device) if processor else device, dtype=dtype, name=name)
    host.resources = resources(name)
    return host


def _assembled(path: Path) -> tuple[Any, Any]:
    from errata.lab.vision import assemble

    return assemble(path, load(NAME, device="cpu", dtype="float32"))


def _place(device: str) -> str:
    """Return where a model that is built in memory goes: ``auto`` leaves those that are live where they are."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resources(name: str = NAME) -> Resources:
    """Return the texts, examples and trained editors that a shipped model is measured and edited with."""
    examples = lambda: cases(EXAMPLES, seed=EXAMPLE_SEED)  # noqa: E731
    gallery = None
    if name == PICTURES:
        from errata.lab import shown

        gallery = shown.gallery()
    return Resources(corpus(), neutral_texts, examples, lambda method: editor(method, name), gallery)


def editor(method: str, name: str = NAME) -> Path | None:
    """Return the file of the editor that is shipped for a method and a model, None where there is none."""
    path = Path(str(files("errata.lab") / "editors" / name / f"{method}.safetensors"))
    return path if path.exists() else None


def card(name: str = NAME) -> dict[str, Any]:
    """Return the model card of a shipped model: data, size, training, recall, layer test."""
    return json.loads((folder(name) / "card.json").read_text(encoding="utf-8"))


def corpus(documents: int = 4000) -> Corpus:
    """Return a sample of text like the model's training text, for statistics."""
    import itertools
    import random

    from errata.lab.text import Writer

    def texts() -> Iterable[str]:
        stream = Writer(default_world()).documents(random.Random("errata-statistics"))
        return (document.text for document in itertools.islice(stream, documents))

    return Corpus(f"lab text, world {default_world().seed}, {documents} documents", texts)
