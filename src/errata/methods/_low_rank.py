"""What methods have in common that train low-rank changes beside all linear maps of some blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from errata.edits.weight import Delta
from errata.errors import ConfigError
from errata.host.beside import Factors
from errata.host.host import Host
from errata.linalg.lowrank import LowRank
from errata.training.tune import rms


def resolve_blocks(host: Host, layers: Sequence[int] | None, default: Sequence[int]) -> tuple[int, ...]:
    """Return the blocks that change, in order; negative numbers count from the top.

    Raises ConfigError for one that there is not.
    """
    depth = len(host.layout.blocks)
    chosen = default if layers is None else layers
    found = tuple(sorted({layer + depth if layer < 0 else layer for layer in chosen}))
    if not found or found[0] < 0 or found[-1] >= depth:
        raise ConfigError(f"layers {list(layers or ())}: expected some of 0 to {depth - 1}")
    return found


def groups(host: Host, factors: Factors, rate: float, *, plain: bool = False) -> list[dict[str, Any]]:
    """Return an optimiser's groups: A at ``rate``, B at ``rate`` times the weight's root mean square and sqrt(d_in).

    ``plain``: B at ``rate`` too.
    """
    found: list[dict[str, Any]] = []
    for path, (outer, inner) in factors.items():
        unit = 1.0 if plain else rms(host.model.get_submodule(path).weight) * inner.shape[1] ** 0.5
        found.append({"params": [outer], "lr": rate * unit})
        found.append({"params": [inner], "lr": rate})
    return found


def deltas_of(host: Host, factors: Factors, scale: float = 1.0) -> tuple[dict[str, Delta], frozenset[str]]:
    """Return ``scale`` B A by path of the weight ``[d_out, d_in]``, and the weights that are stored transposed."""
    deltas: dict[str, Delta] = {
        f"{path}.weight": LowRank(scale * outer.detach(), inner.detach())
        for path, (outer, inner) in factors.items()
    }
    across = frozenset(
        f"{path}.weight"
        for path in factors
        if not isinstance(host.model.get_submodule(path), torch.nn.Linear)
    )
    return deltas, across
