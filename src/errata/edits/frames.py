"""Attribute warnings to the code that called the library."""

from __future__ import annotations

import inspect


def stack_level(*packages: str) -> int:
    """Return the ``stacklevel`` at which ``warnings.warn``, called here, names the first caller outside packages."""
    level, frame = 0, inspect.currentframe()
    frame = frame.f_back if frame is not None else None  # the function that warns
    while frame is not None and frame.f_back is not None:
        level += 1
        if frame.f_globals.get("__name__", "").split(".")[0] not in packages:
            break
        frame = frame.f_back
    return level
