"""Requests of one edit that contradict each other."""

from __future__ import annotations

import warnings
from dataclasses import replace

from errata.edits.edit import Edit
from errata.types import Request
from errata.writing import folded


def with_conflicts(edit: Edit, count: int) -> Edit:
    """Warn of, and note, requests with one prompt and different targets, one of them among the last ``count``."""
    requests = [r for r in edit.provenance.requests if isinstance(r, Request)]
    first = len(requests) - count
    seen: dict[str, int] = {}
    pairs: list[list[str]] = []
    for number, request in enumerate(requests):
        before = seen.get(folded(request.text))
        seen[folded(request.text)] = number
        if before is None or number < first:
            continue
        if folded(requests[before].target) != folded(request.target):
            pairs.append([requests[i].id or str(i + 1) for i in (before, number)])
            warnings.warn(
                f"requests {pairs[-1][0]!r} and {pairs[-1][1]!r} have one prompt and the targets "
                f"{requests[before].target!r} and {request.target!r}; both are in the edit, and the method decides "
                "which acts: take one out (errata retract)",
                stacklevel=4,
            )
    if not pairs:
        return edit
    record = replace(edit.provenance, notes={**edit.provenance.notes, "conflicts": pairs})
    return replace(edit, provenance=record)  # type: ignore[type-var]
