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


# (model_type, number of blocks, residual width): the settings of UltraEdit's code
ULTRAEDIT: dict[tuple[str, int, int], tuple[str, ...]] = {
    ("gptj", 28, 4096): ("mlp_out@18-26",),
    ("llama", 32, 4096): ("gate_proj@11-15", "up_proj@18-24"),
    ("mistral", 32, 4096): ("mlp_out@29-30",),
    ("qwen2", 28, 3584): ("gate_proj@18-26", "up_proj@18-26"),
}


def ultraedit_modules(model_type: str, blocks: int, width: int) -> tuple[str, ...]:
    """Return the maps that UltraEdit's code edits in a model of this shape, else the feed-forward's outputs."""
    return ULTRAEDIT.get((model_type, blocks, width), ("mlp_out",))


@dataclass(frozen=True)
class Encore:
    """What ENCORE's code sets for a model."""

    update_norm_lambda: float
    """mu, plain."""
    learning_rate: float
    """The search's rate, plain."""
    top_count: int
    """Evaluations in which the target was the first choice, after which a search ends."""


# (model_type, number of blocks, residual width, inner width): Llama 2 7B and Llama 3 8B differ in the last alone
ENCORE: dict[tuple[str, int, int, int], Encore] = {
    ("gpt2", 48, 1600, 6400): Encore(10.0, 0.5, 4),
    ("llama", 32, 4096, 11008): Encore(10.0, 0.5, 3),
    ("llama", 32, 4096, 14336): Encore(20.0, 0.5, 2),
}


def encore(model_type: str, blocks: int, width: int, inner: int) -> Encore | None:
    """Return the settings of ENCORE's code for a model of this shape."""
    return ENCORE.get((model_type, blocks, width, inner))
