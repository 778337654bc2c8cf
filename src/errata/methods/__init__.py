"""The catalogue. One file is one method is one paper; the file's name is the method's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.registry import Registry

if TYPE_CHECKING:
    from errata.methods._method import Method

DEFAULT = "keel"
"""The method that is used where none is named."""

REGISTRY: Registry[Method] = Registry("errata.methods", "METHOD", "Method", group="errata.methods")
