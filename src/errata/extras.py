"""Packages that only some of errata's work needs: present before the work begins, or one message names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from errata.errors import ConfigError


def need(what: str, extra: str, *modules: str) -> tuple[ModuleType, ...]:
    """Import optional modules. Raises ConfigError naming those that are missing, and the extra that brings them.

    ``what``: what they are needed for, as the subject of a sentence.
    """
    imported, missing = [], []
    for name in modules:
        try:
            imported.append(importlib.import_module(name))
        except ImportError:
            missing.append(name.partition(".")[0])
    if missing:
        raise ConfigError(f"{what} needs {' and '.join(missing)}: pip install 'errata[{extra}]'")
    return tuple(imported)
