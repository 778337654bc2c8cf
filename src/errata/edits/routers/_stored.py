"""A router as an edit's file holds it: its tensors under ``router.``, its name and settings in the header."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from errata.edits import header as fields
from errata.edits.routers import ROUTERS
from errata.edits.routers._router import Router

PREFIX = "router."


def parts_of(router: Router) -> dict[str, Tensor]:
    """Return a router's tensors ``[entries, ...]`` by the names they have in a file."""
    return {f"{PREFIX}{name}": tensor for name, tensor in router.tensors().items()}


def body_of(router: Router) -> dict[str, Any]:
    """Return everything else of a router, as plain data."""
    return {"name": router.name, "facts": router.facts()}


def restore(parts: Mapping[str, Tensor], body: Mapping[str, Any]) -> Router:
    """Build the router from its edit file's tensors ``[entries, ...]`` and header. Raises ValueError or KeyError."""
    stored = fields.get_field(body, "router", dict, "the header")
    kind = ROUTERS.get(fields.get_field(stored, "name", str, "router"))
    tensors = {n.removeprefix(PREFIX): t for n, t in parts.items() if n.startswith(PREFIX)}
    return kind.restore(tensors, fields.get_field(stored, "facts", dict, "router"))
