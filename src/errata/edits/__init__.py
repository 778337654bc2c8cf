"""The results of methods. Importing this package makes every kind of edit known to ``Edit.load``."""

from errata.edits.edit import Edit, Placement, Provenance
from errata.edits.memory import MemoryEdit
from errata.edits.model import ModelEdit
from errata.edits.prompt import PromptEdit
from errata.edits.steer import SteerEdit
from errata.edits.weight import WeightEdit

__all__ = [
    "Edit",
    "MemoryEdit",
    "ModelEdit",
    "Placement",
    "PromptEdit",
    "Provenance",
    "SteerEdit",
    "WeightEdit",
]
