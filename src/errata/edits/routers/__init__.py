"""Routers: whether an entry of a memory acts on a row, and which. One file is one kind; found by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.registry import Registry

if TYPE_CHECKING:
    from errata.edits.routers._router import Router

ROUTERS: Registry[type[Router]] = Registry(
    "errata.edits.routers", "ROUTER", "type of a router", group="errata.routers"
)
