"""What structure does not tell: published choices of layers, as data. One row a checkpoint shape."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Search:
    """A value search as the authors' code ran it, in its own units (``scale: published``)."""

    learning_rate: float
    clamp: float


@dataclass(frozen=True)
class Published:
    """Layers and settings that a method's paper or its authors' code used for a model."""

    rome: int
    """ROME's layer, 0-indexed."""
    memit: tuple[int, ...]
    """MEMIT's layers, 0-indexed."""
    cov_weight: float
    """MEMIT's lambda."""
    rome_search: Search
    memit_search: Search
    source: str


# (model_type, number of blocks, residual width)
PUBLISHED: dict[tuple[str, int, int], Published] = {
    ("gpt2", 48, 1600): Published(
        17, (13, 14, 15, 16, 17), 20_000.0, Search(0.5, 4.0), Search(0.5, 0.75), "ROME and MEMIT, GPT-2 XL"
    ),
    ("gptj", 28, 4096): Published(
        5, (3, 4, 5, 6, 7, 8), 15_000.0, Search(0.5, 4.0), Search(0.5, 0.75), "ROME and MEMIT, GPT-J 6B"
    ),
    ("gpt_neox", 44, 6144): Published(
        15, (6, 7, 8, 9, 10), 20_000.0, Search(0.5, 4.0), Search(0.5, 0.3), "ROME and MEMIT, GPT-NeoX 20B"
    ),
    ("llama", 32, 4096): Published(
        5, (4, 5, 6, 7, 8), 15_000.0, Search(0.5, 4.0), Search(0.1, 0.75), "AlphaEdit's code, Llama 3 8B"
    ),
}


def published(model_type: str, blocks: int, width: int) -> Published | None:
    """Look a model up by family and shape."""
    return PUBLISHED.get((model_type, blocks, width))
