"""Take edits together and apart: one ridge regression stands for any set of closed-form edits.

Every such edit keeps, per weight, its keys, the absolute target changes at them and M^-1
times the keys (:mod:`errata.edits.records`). Solving all of them at once needs neither the model nor its
statistics, does not depend on their order, and leaves out exactly what is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from errata.edits.edit import Edit, timestamp
from errata.edits.records import Record
from errata.edits.weight import Delta, WeightEdit
from errata.errors import EditError


def refit(edits: Edit | Sequence[Edit]) -> WeightEdit:
    """Solve for all requests of some edits together, as one edit.

    The result does not depend on the edits' order beyond rounding. For a sequence whose method protects
    earlier keys (alphaedit, encore, memit with ``history``) it is what the sequence gave; for one that
    does not, it is what protecting them would have given. Raises EditError for edits that keep no records,
    whose deltas were reshaped, that belong to different hosts, or that were solved under different cost matrices.
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
    return _solved(total, total.records, given)


def retract(edit: Edit, which: str | int | Sequence[str | int]) -> WeightEdit:
    """Return the edit as it would be had some of its requests never been made.

    ``which``: ids of requests as texts, or whole numbers that index ``edit.provenance.requests``, so that 0 is
    the first; the command line and all messages count from 1. Several may go, in any order. Raises EditError
    when a request is not there, or when nothing would be left (then take the edit back whole).
    """
    known = _checked(edit)
    asked = [which] if isinstance(which, (str, int)) else list(which)
    requests = known.provenance.requests
    gone = {place(known, item) for item in asked}
    left = [i for i in range(len(requests)) if i not in gone]
    if not left:
        raise EditError("no request would be left: take the edit back whole instead")
    records = {name: record.select(left) for name, record in known.records.items()}
    kept = replace(known.provenance, requests=tuple(requests[i] for i in left))
    return _solved(replace(known, provenance=kept), records, [edit])


def leverages(edit: Edit) -> list[float]:
    """Return, per request, the least share of its own values that it decides itself, 0 to 1.

    Near 1, a request has its keys for itself; near 0, others or what is to be preserved outweigh it, and
    taking it out changes little.
    """
    known = _checked(edit, solved=False)
    least = [1.0] * len(known.provenance.requests)
    for record in known.records.values():
        for group, share in zip(record.requests, map(float, record.leverages().cpu()), strict=True):
            for request in group:
                least[request] = min(least[request], share)
    return least


def place(edit: Edit, item: str | int) -> int:
    """Return a request's place in the edit's provenance, from 0, by its id or that place.

    Raises EditError when there is no such request, or several.
    """
    requests = edit.provenance.requests
    if isinstance(item, int) and not isinstance(item, bool):
        if 0 <= item < len(requests):
            return item
        raise EditError(
            f"the edit has no request {item} counted from 0; it has {len(requests)}, the last is {len(requests) - 1}"
        )
    matches = [i for i, request in enumerate(requests) if request.id == item]
    if not matches:
        raise EditError(f"the edit has no request {item!r:.80}; it has {listed(edit)}")
    if len(matches) > 1:
        numbers = ", ".join(str(i + 1) for i in matches)
        raise EditError(
            f"{len(matches)} requests are called {item!r:.80}: numbers {numbers} as the command line counts, from 1; "
            "name the one that is meant by its number"
        )
    return matches[0]


def numbered(edit: Edit, text: str) -> tuple[int, str | None]:
    """Read what a person calls a request: its id, else its number from 1; its place from 0, and a remark.

    The remark, or None, says where a text is both the id of one request and the number of another.
    Raises EditError as :func:`place` does.
    """
    requests = edit.provenance.requests
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if any(request.id == text for request in requests):
        index = place(edit, text)
        if 1 <= number <= len(requests) and number != index + 1:
            return index, f"{text!r} is taken as the id of request {index + 1}, not as number {number}"
        return index, None
    if 1 <= number <= len(requests):
        return number - 1, None
    raise EditError(
        f"the edit has no request {text!r:.80}; it has {listed(edit)}: give an id, or a number from 1 to "
        f"{len(requests)}"
    )


def listed(edit: Edit) -> str:
    """Name the first requests of an edit, each by its number from 1 and its id."""
    requests = edit.provenance.requests
    names = [f"{i} ({one.id[:40]!r})" if one.id else str(i) for i, one in enumerate(requests[:20], 1)]
    return ", ".join(names) + (" ..." if len(requests) > 20 else "")


def _checked(edit: Edit, *, solved: bool = True) -> WeightEdit:
    if not isinstance(edit, WeightEdit) or not edit.records or edit.records.keys() != edit.deltas.keys():
        raise EditError(
            f"the edit by {edit.provenance.method} keeps no keys and values to solve again from; "
            "closed-form weight edits do (rome, memit, alphaedit ...); take it back whole instead"
        )
    reshaped = [name for name, record in edit.records.items() if not record.is_exact_solution]
    if solved and reshaped:
        raise EditError(
            f"{reshaped[0]} was reshaped after it was solved (stabilise, or a choice of neurons), so solving "
            "again would give something else; take the edit back whole instead"
        )
    return edit


def _solved(edit: WeightEdit, records: Mapping[str, Record], parents: Sequence[Edit]) -> WeightEdit:
    deltas: dict[str, Delta] = {name: record.delta() for name, record in records.items()}
    digests = tuple(parent.digest for parent in parents)
    provenance = replace(edit.provenance, parents=digests, created=timestamp())
    return WeightEdit(deltas, edit.transposed, provenance, records, edit.state)
