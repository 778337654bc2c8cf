"""Types of progress callbacks, and the one that does nothing."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a phase, how many of its items are done, and how many there are."""
OnCount = Callable[[int, int], None]
"""The same within one phase: how many items are done, and how many there are."""


def ignore(*_: object) -> None:
    """Do nothing; the default of progress callbacks."""
