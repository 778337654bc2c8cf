"""Baselines: the methods that every board includes for comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.methods import REGISTRY

if TYPE_CHECKING:
    from errata.methods._method import Method


def baselines() -> list[Method]:
    """Return the registered methods that every board includes, in their order there."""
    ranked = [(method.baseline, method) for method in map(REGISTRY.get, REGISTRY) if method.baseline]
    return [method for _, method in sorted(ranked, key=lambda pair: pair[0])]
