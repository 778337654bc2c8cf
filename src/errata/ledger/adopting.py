"""Bring an edit that was not fitted here into a ledger: measured and applied as any other, without requests.

Nothing says what an imported change was meant to do, so that nothing is asked of its own targets. All other bounds
hold: earlier requests, canaries, divergence, perplexity, norm, finite numbers.
"""

from __future__ import annotations

from errata.edits.edit import Edit
from errata.errors import LedgerError
from errata.ledger.contents import facts_of, keep
from errata.ledger.events import SHORT
from errata.ledger.recording import Attempt, Order, Recorder, guard_of
from errata.ledger.working import Working


def adopt(working: Working, edit: Edit, order: Order) -> Attempt:
    """Record an edit, measure it on top of what is in place, and apply it if it keeps the guard's bounds.

    ``order``: reason, source, author, and whether the guard refuses. Raises LedgerError for an edit that is in place.
    """
    ledger = working.ledger
    active = ledger.state().active
    if edit.digest in active:
        raise LedgerError(f"edit {edit.digest[:SHORT]} is in place already")
    recorder = Recorder(working, order, guard_of(working))
    working.show(active)
    return recorder.apply(edit, (), facts_of(edit, keep(ledger, edit), working.active))
