"""Take edits together and apart: one ridge regression stands for any set of closed-form edits.

Every such edit keeps, per weight, its keys, the absolute change wanted at them and the metric's answer to
the keys (:mod:`errata.edits.records`). Solving all of them at once needs neither the model nor its
statistics, does not depend on their order, and leaves out exactly what is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from errata.edits.edit import Edit
from errata.edits.records import Record
from errata.edits.weight import Delta, WeightEdit
from errata.errors import EditError


def refit(edits: Edit | Sequence[Edit]) -> WeightEdit:
    """Solve for all requests of some edits together, as one edit.

    The result does not depend on the edits' order beyond rounding. For a sequence whose method protects
    earlier keys (alphaedit, encore, memit with ``history``) it is what the sequence gave; for one that
    does not, it is what protecting them would have given. Raises EditError for edits that keep no records,
    whose deltas were reshaped, that belong to different hosts, or that were solved under different metrics.
    """
    given = [edits] if isinstance(edits, Edit) else list(edits)
    if not given:
        raise EditError("no edits given to refit")
    checked = [_checked(edit) for edit in given]
    total = checked[0]
    for edit in checked[1:]:
        if edit.provenance.host != total.provenance.host:
            raise EditError(
                f"edits for different hosts do not join: {total.provenance.host} and {edit.provenance.host}"
            )
        if edit.records.keys() != total.records.keys():
            raise EditError(
                f"edits of different weights do not join: {sorted(total.records)} and {sorted(edit.records)}"
            )
        total = total.then(edit)
    return _solved(total, total.records)


def retract(edit: Edit, which: str | int | Sequence[str | int]) -> WeightEdit:
    """Return the edit as it would be had some of its requests never been made.

    ``which``: request ids, or numbers counted from 0. Several may go, in any order. Raises EditError
    when a request is not there, or when nothing would be left (then take the edit back whole).
    """
    known = _checked(edit)
    asked = [which] if isinstance(which, (str, int)) else list(which)
    requests = known.provenance.requests
    gone = {_number(known, item) for item in asked}
    left = [i for i in range(len(requests)) if i not in gone]
    if not left:
        raise EditError("no request would be left: take the edit back whole instead")
    records = {name: record.kept(left) for name, record in known.records.items()}
    kept = replace(known.provenance, requests=tuple(requests[i] for i in left))
    return _solved(replace(known, provenance=kept), records)


def leverages(edit: Edit) -> list[float]:
    """Return, per request, the least share of its own values that it decides itself, 0 to 1.

    Near 1, a request has its keys for itself; near 0, others or what is to be preserved outweigh it, and
    taking it out changes little.
    """
    known = _checked(edit, solved=False)
    least = [1.0] * len(known.provenance.requests)
    for record in known.records.values():
        for group, share in zip(record.requests, record.leverages().tolist(), strict=True):
            for request in group:
                least[request] = min(least[request], share)
    return least


def _number(edit: WeightEdit, item: str | int) -> int:
    requests = edit.provenance.requests
    if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < len(requests):
        return item
    found = [i for i, request in enumerate(requests) if request.id == item]
    if not found:
        names = [request.id or str(i) for i, request in enumerate(requests)]
        raise EditError(f"the edit has no request {item!r}; it has {', '.join(names[:20])}")
    if len(found) > 1:
        raise EditError(f"{len(found)} requests are called {item!r}; name one by its number, from 0")
    return found[0]


def _checked(edit: Edit, *, solved: bool = True) -> WeightEdit:
    if not isinstance(edit, WeightEdit) or not edit.records or edit.records.keys() != edit.deltas.keys():
        raise EditError(
            f"the edit by {edit.provenance.method} keeps no keys and values to solve again from; "
            "closed-form weight edits do (rome, memit, alphaedit ...); take it back whole instead"
        )
    reshaped = [name for name, record in edit.records.items() if not record.solves]
    if solved and reshaped:
        raise EditError(
            f"{reshaped[0]} was reshaped after it was solved (stabilise, or a choice of neurons), so solving "
            "again would give something else; take the edit back whole instead"
        )
    return edit


def _solved(edit: WeightEdit, records: Mapping[str, Record]) -> WeightEdit:
    deltas: dict[str, Delta] = {name: record.delta() for name, record in records.items()}
    return WeightEdit(deltas, edit.transposed, edit.provenance, records, edit.state)
