"""Join and split edits: any set of closed-form edits is the solution of one ridge regression.

Such an edit records, per weight, its keys, the absolute target changes at them and M^-1 times the keys
(:mod:`errata.edits.records`). Solving for all of them jointly needs neither the model nor its statistics, does not
depend on their order, and can omit any request exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from errata.edits.edit import Edit, timestamp
from errata.edits.memory import MemoryEdit
from errata.edits.records import Record
from errata.edits.weight import Delta, WeightEdit
from errata.errors import EditError


def refit(edits: Edit | Sequence[Edit]) -> WeightEdit:
    """Solve for all requests of some edits together, as one edit.

    The result does not depend on the edits' order beyond rounding. For a sequence whose method protects earlier keys
    (alphaedit, encore, memit with ``history``) it equals the result of the sequence; for other methods, the result
    that protecting them would have given. At statements of the model's own (``anchors``, ``mates``) the outputs of the
    host without any of the edits are preserved. Raises EditError for edits without records, whose deltas were modified
    after solving, that belong to different hosts, or that were solved with different cost matrices.
    """
    parents = [edits] if isinstance(edits, Edit) else list(edits)
    if not parents:
        raise EditError("no edits given to refit")
    checked = [_require_records(edit) for edit in parents]
    total = checked[0]
    for edit in checked[1:]:
        if edit.provenance.host != total.provenance.host:
            raise EditError(
                f"edits for different hosts cannot be joined: {total.provenance.host} and {edit.provenance.host}"
            )
        if edit.records.keys() != total.records.keys():
            raise EditError(
                f"edits of different weights cannot be joined: {sorted(total.records)} and {sorted(edit.records)}"
            )
        total = total.then(edit)
    return _solve(total, total.records, parents)


def retract(edit: Edit, which: str | int | Sequence[str | int]) -> WeightEdit | MemoryEdit:
    """Return the edit recomputed without some of its requests, or a memory without some blocks and their requests.

    ``which``: ids of requests as texts, or whole numbers that index ``edit.provenance.requests``, so that 0 is
    the first; the command line and all messages count from 1. Several are retracted in any order. Raises EditError
    when there is no such request, or when none would be left (then revert the whole edit).
    """
    items = [which] if isinstance(which, (str, int)) else list(which)
    if isinstance(edit, MemoryEdit):
        return edit.without({request_index(edit, item) for item in items})
    full = _require_records(edit)
    requests = full.provenance.requests
    retracted = {request_index(full, item) for item in items}
    rest = [i for i in range(len(requests)) if i not in retracted]
    if not rest:
        raise EditError("no request would be left: revert the whole edit instead")
    records = {name: record.select(rest) for name, record in full.records.items()}
    provenance = replace(full.provenance, requests=tuple(requests[i] for i in rest))
    return _solve(replace(full, provenance=provenance), records, [edit])


def leverages(edit: Edit) -> list[float]:
    """Return the leverage of each request, 0 to 1: the minimum over weights and keys.

    Near 1, the outputs at its keys depend on this request alone; near 0, other requests or the cost matrix outweigh it,
    and retracting it changes little.
    """
    edit = _require_records(edit, exact=False)
    least = [1.0] * len(edit.provenance.requests)
    for record in edit.records.values():
        for group, share in zip(record.target_requests, map(float, record.leverages().cpu()), strict=True):
            for request in group:
                least[request] = min(least[request], share)
    return least


def request_index(edit: Edit, item: str | int) -> int:
    """Return a request's index in the edit's provenance, from 0, by its id or that index.

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
        raise EditError(f"the edit has no request {item!r:.80}; it has {list_requests(edit)}")
    if len(matches) > 1:
        numbers = ", ".join(str(i + 1) for i in matches)
        raise EditError(
            f"{len(matches)} requests have the id {item!r:.80}, their numbers in the command line are {numbers}; "
            "give one of these numbers"
        )
    return matches[0]


def find_request(edit: Edit, text: str) -> tuple[int, str | None]:
    """Return the index, from 0, of a request given by its id or else by its number from 1, and a remark.

    The remark, or None, notes that a text is both the id of one request and the number of another.
    Raises EditError as :func:`request_index` does.
    """
    requests = edit.provenance.requests
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
    if any(request.id == text for request in requests):
        index = request_index(edit, text)
        if 1 <= number <= len(requests) and number != index + 1:
            return index, f"{text!r} is taken as the id of request {index + 1}, not as number {number}"
        return index, None
    if 1 <= number <= len(requests):
        return number - 1, None
    raise EditError(
        f"the edit has no request {text!r:.80}; it has {list_requests(edit)}: give an id, or a number from 1 to "
        f"{len(requests)}"
    )


def list_requests(edit: Edit) -> str:
    """List the first requests of an edit, each by its number from 1 and its id."""
    requests = edit.provenance.requests
    names = [f"{i} ({one.id[:40]!r})" if one.id else str(i) for i, one in enumerate(requests[:20], 1)]
    return ", ".join(names) + (" ..." if len(requests) > 20 else "")


def _require_records(edit: Edit, *, exact: bool = True) -> WeightEdit:
    """Return an edit with records. Raises EditError for others, with ``exact`` also for one that was reshaped."""
    if not isinstance(edit, WeightEdit) or not edit.records or edit.records.keys() != edit.deltas.keys():
        raise EditError(
            f"the edit by {edit.provenance.method} has no records of keys and target values to solve again; "
            "closed-form weight edits do (rome, memit, alphaedit ...); revert the whole edit instead"
        )
    partial = [
        name
        for name, one in edit.records.items()
        if _served(one) != set(range(len(edit.provenance.requests)))
    ]
    if partial:
        raise EditError(
            f"the edit has records for some of its requests only at {partial[0]}, so solving again would "
            "lose the others; revert the whole edit instead"
        )
    reshaped = [name for name, record in edit.records.items() if not record.is_exact_solution]
    if exact and reshaped:
        raise EditError(
            f"{reshaped[0]} was modified after it was solved (stabilise, or a selection of neurons), so solving "
            "again would give another result; revert the whole edit instead"
        )
    return edit


def _served(record: Record) -> set[int]:
    return {request for group in record.requests for request in group}


def _solve(edit: WeightEdit, records: Mapping[str, Record], parents: Sequence[Edit]) -> WeightEdit:
    deltas: dict[str, Delta] = {name: record.delta() for name, record in records.items()}
    digests = tuple(parent.digest for parent in parents)
    provenance = replace(edit.provenance, parents=digests, created=timestamp())
    return WeightEdit(deltas, edit.transposed, provenance, records, edit.state)
