"""Where cases come from: the lab's world, a named dataset, or a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from errata import lab
from errata.errors import ConfigError
from errata.types import Case


def read(source: str, *, seed: int = 0, together: bool = False) -> tuple[list[Case], dict[str, Any]]:
    """Read the cases of a source, and what is to be recorded about them.

    ``source``: ``lab:N`` for N cases of the lab's world, drawn with ``seed`` and, where ``together``, so that
    their edits can stand together; else what :func:`errata.data.reading.read` takes. The facts are
    ``{"source", "together", "sha256", "rows", "cases", "check"}``: the hash is one of the cases as read, so a
    changed file, loader or number of cases is another dataset. Raises ConfigError or DataError.
    """
    head, colon, count = source.partition(":")
    if head == lab.NAME and colon:
        if not count.isdecimal():
            raise ConfigError(f"{source!r}: expected lab:N with a number N")
        cases = lab.cases(int(count), seed=seed, together=together)
        return cases, _facts(source, cases, together, len(cases), {"seed": seed})
    from errata.data import reading

    loaded = reading.read(source)
    if not loaded.cases:
        raise ConfigError(f"{source} gives no cases; see: errata data check {source}")
    check = asdict(loaded.check)
    cases = list(loaded.cases)
    return cases, _facts(source, cases, False, int(check.get("rows", len(cases))), check)


def digest(cases: Sequence[Case]) -> str:
    """Hash cases with all that is in them, 64 hex digits."""
    found = hashlib.sha256()
    for case in cases:
        found.update(json.dumps(asdict(case), sort_keys=True).encode() + b"\n")
    return found.hexdigest()


def _facts(source: str, cases: Sequence[Case], together: bool, rows: int, check: Any) -> dict[str, Any]:
    return {
        "source": source,
        "together": together,
        "sha256": digest(cases),
        "rows": rows,
        "cases": len(cases),
        "check": check,
    }
