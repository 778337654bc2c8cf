"""Take edits, and single requests of edits, out of place again. Needs the edits' files, not the model.

An edit in place is taken off; the edits whose place it took, as it included them, come back. One that another in
place includes is taken out of it: solved again without its requests where it is closed-form, without their entries
where it acts at run time. What cannot be separated exactly is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from errata.edits.algebra import retract
from errata.errors import EditError, LedgerError
from errata.ledger.contents import facts_of, keep, load_edit
from errata.ledger.events import SHORT, Event
from errata.ledger.state import Recorded, State
from errata.ledger.store import Ledger


def revert(ledger: Ledger, name: str, *, reason: str = "", author: str = "") -> Event:
    """Take an edit out of place, wherever it stands in the order, and return the event that did it.

    Raises LedgerError for one that is not in place, nor in an edit in place that can be taken apart.
    """
    state = ledger.state()
    one = state.find_edit(name)
    if one.digest in state.active:
        restores = [digest for digest in one.replaces if "retracted_from" not in one.facts]
        body = {"restores": restores}
        return ledger.append(
            "reverted", edit=one.digest, body=body, reason=reason, author=author, expected=state.active
        )
    holder = _holder(state, one)
    if holder is None:
        raise LedgerError(
            f"edit {one.short} is not in place, so there is nothing to revert; see errata status"
        )
    return take_out(ledger, holder.digest, _places(holder, one), reason=reason, author=author)


def take_out(
    ledger: Ledger, digest: str, numbers: Sequence[int], *, reason: str = "", author: str = ""
) -> Event:  # fmt: skip
    """Take some requests, by number from 0, out of an edit in place and return the event that did it.

    What is left is as if they had never been made. Raises LedgerError where the edit cannot be taken apart.
    """
    state = ledger.state()
    edit = load_edit(ledger, digest)
    if len(set(numbers)) == len(edit.provenance.requests):
        return ledger.append("reverted", edit=digest, reason=reason, author=author, expected=state.active)
    try:
        rest = retract(edit, sorted(set(numbers)))
    except EditError as error:
        names = ", ".join(str(n + 1) for n in sorted(set(numbers)))
        raise LedgerError(
            f"request {names} cannot be taken out of edit {digest[:SHORT]} alone: {error}; revert the whole edit"
        ) from error
    facts = facts_of(rest, keep(ledger, rest), state.edits[digest].facts["beneath"], retracted_from=digest)
    ledger.append("proposed", edit=rest.digest, body=facts, reason=reason, author=author)
    return ledger.append(
        "applied", edit=rest.digest, body={"replaces": [digest]}, reason=reason, author=author,
        expected=state.active,
    )  # fmt: skip


def reset(ledger: Ledger, name: str, *, reason: str = "", author: str = "") -> Event:
    """Have exactly the edits of a revision in place, see :meth:`State.find_event`; return the event."""
    body = {"active": list(ledger.active_at(name)), "to": name}
    return ledger.append("reset", body=body, reason=reason, author=author)


def _holder(state: State, one: Recorded) -> Recorded | None:
    """Return the edit in place that took an edit's place, directly or through others."""
    for digest in state.active:
        todo = [*state.edits[digest].replaces]
        while todo:
            earlier = state.edits[todo.pop()]
            if earlier.digest == one.digest:
                return state.edits[digest]
            todo += earlier.replaces
    return None


def _places(holder: Recorded, one: Recorded) -> list[int]:
    """Return the numbers, in the edit that holds them, of an edit's requests."""
    rest = list(one.requests)
    places: list[int] = []
    for number, request in enumerate(holder.requests):
        if request in rest:
            rest.remove(request)
            places.append(number)
    if rest:
        raise LedgerError(
            f"{len(rest)} requests of edit {one.short} are no longer in edit {holder.short}; see errata show"
        )
    return places
