"""Limits of the documents that are read, and how a parser complains."""

from __future__ import annotations

from collections.abc import Callable

from errata.errors import ErrataError

MOST_NODES = 1_000_000
"""Maximum number of values in a YAML document after its aliases are expanded."""
DEEPEST = 200
"""Maximum nesting depth."""
MOST_DIGITS = 4300
"""Maximum digits of a number, Python's own limit."""

Fail = Callable[[str], ErrataError]
"""Makes the error to raise from a reason."""
