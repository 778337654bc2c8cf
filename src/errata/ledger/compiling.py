"""Several edits that are in place together as one: what is exported of a ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from errata.edits.deltas import Delta
from errata.edits.edit import Edit, timestamp
from errata.edits.weight import WeightEdit, add_deltas
from errata.errors import LedgerError


def compiled(edits: Sequence[Edit]) -> Edit:
    """Return one edit that does what some edits do together; of several, all must change weights.

    Low-rank changes are joined exactly, their ranks add up. The result has no records: single requests are taken out
    of the edits that it was made from. Raises LedgerError where there are no edits, or kinds that no one file holds.
    """
    if not edits:
        raise LedgerError("no edit is in place, so there is nothing to export")
    if len(edits) == 1:
        return edits[0]
    deltas: dict[str, Delta] = {}
    transposed: set[str] = set()
    for edit in edits:
        if not isinstance(edit, WeightEdit):
            kinds = ", ".join(sorted({one.kind for one in edits}))
            raise LedgerError(
                f"the edits in place are of kinds {kinds}: only weight edits can be exported together; name one edit"
            )
        for name, delta in edit.deltas.items():
            deltas[name] = add_deltas(deltas[name], delta) if name in deltas else delta
        transposed |= edit.transposed
    methods = list(dict.fromkeys(edit.provenance.method for edit in edits))
    provenance = replace(
        edits[-1].provenance, method="+".join(methods), config={}, notes={}, created=timestamp(),
        requests=tuple(request for edit in edits for request in edit.provenance.requests),
        parents=tuple(edit.digest for edit in edits),
    )  # fmt: skip
    return WeightEdit(deltas, frozenset(transposed), provenance)
