"""The result of a method. Importing the room makes every kind of edit known to ``Edit.load``."""

from errata.edits.edit import Edit, Provenance
from errata.edits.weight import WeightEdit

__all__ = ["Edit", "Provenance", "WeightEdit"]
