"""The datasets: one module each, its name the dataset's; see :class:`errata.data._base.Dataset`."""

from __future__ import annotations

from errata.data._base import Dataset
from errata.registry import Registry

REGISTRY: Registry[Dataset] = Registry("errata.data.sets", "DATASET", Dataset, group="errata.datasets")
