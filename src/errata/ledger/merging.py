"""Bring the edits of another ledger of the same model into this one, with their conflicts reported and resolved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from errata.edits.edit import Edit
from errata.edits.records import Record
from errata.edits.weight import WeightEdit
from errata.errors import LedgerError
from errata.ledger import conflicts
from errata.ledger.conflicts import Conflict
from errata.ledger.contents import facts_of, keep, load_edit
from errata.ledger.recording import Attempt, Order, Recorder, guard_of, make_way
from errata.ledger.store import Ledger
from errata.ledger.working import Working

NEAR = 0.95
"""Cosine of two keys from which their requests are reported as near-duplicates."""


@dataclass(frozen=True)
class Merge:
    """The outcome of a merge."""

    attempts: tuple[Attempt, ...]
    """Edits of the other ledger that are not in place here, in its order."""
    conflicts: tuple[Conflict, ...]
    known: tuple[str, ...]
    """Digests of the other ledger's edits that were in place here already."""

    @property
    def passed(self) -> bool:
        """Whether all of the other ledger's edits are in place."""
        return all(one.applied for one in self.attempts)


def merge(working: Working, other: Ledger, order: Order) -> Merge:
    """Apply the edits that another ledger has in place, in its order, each measured by the guard as a new edit is.

    ``order``: reason, author, whether the guard refuses, and the policy for requests that contradict edits in place
    here. Raises LedgerError for a ledger of another model, ConflictError, with nothing changed, under the policy
    ``error``.
    """
    ledger = working.ledger
    here, there = ledger.state(), other.state()
    if here.model["fingerprint"] != there.model["fingerprint"]:
        raise LedgerError(
            f"{other.folder} is about host {there.model['fingerprint']} ({there.model['name']}), this ledger about "
            f"{here.model['fingerprint']} ({here.model['name']}); only edits of one model can be merged"
        )
    known = tuple(digest for digest in there.active if digest in here.active)
    new = [digest for digest in there.active if digest not in here.active]
    edits = [load_edit(other, digest) for digest in new]
    found: list[Conflict] = []
    for edit in edits:
        found += conflicts.find(ledger, here, [r.to_dict() for r in edit.provenance.requests])
        found += near_duplicates(edit, working.edits(here.active), found)
    giving_way = conflicts.to_replace(found, order.conflicts or ledger.settings.conflicts)
    if giving_way:
        make_way(working, giving_way, order)
    recorder = Recorder(working, order, guard_of(working))
    attempts: list[Attempt] = []
    for digest, edit in zip(new, edits, strict=True):
        recorded = there.edits[digest]
        working.show(ledger.state().active)
        facts = facts_of(
            edit, keep(ledger, edit), recorded.facts["beneath"], merged_from=str(there.head),
            reason=recorded.event.reason, author=recorded.event.author, source=recorded.event.source,
        )  # fmt: skip
        attempts.append(recorder.apply(edit, edit.provenance.requests, facts))  # type: ignore[arg-type]
    body = {
        "head": there.head, "edits": [one.edit for one in attempts if one.applied],
        "refused": [one.edit for one in attempts if not one.applied],
        "conflicts": [one.to_dict() for one in found],
    }  # fmt: skip
    ledger.append("merged", body=body, reason=order.reason, author=order.author)
    return Merge(tuple(attempts), tuple(found), known)


def near_duplicates(edit: Edit, others: Sequence[Edit], known: Sequence[Conflict]) -> list[Conflict]:
    """Return pairs of requests, one of an edit and one of others, whose recorded keys are nearly the same.

    By the largest cosine of two keys of one weight; edits without records have no keys. Pairs that are in conflict
    already, for the same edit and request, are left out.
    """
    found: list[Conflict] = []
    taken = {(one.other, one.other_request, one.name) for one in known}
    requests = [r.to_dict() for r in edit.provenance.requests]
    for other in others:
        for (i, j), cosine in sorted(_cosines(edit, other).items()):
            record = other.provenance.requests[j].to_dict()
            if cosine >= NEAR and (other.digest, j, conflicts.name_of(requests[i])) not in taken:
                found.append(
                    conflicts.between(
                        "near-duplicate", i, requests[i], other.digest, j, record, round(cosine, 4)
                    )
                )
    return found


def _cosines(edit: Edit, other: Edit) -> dict[tuple[int, int], float]:
    """Return, by a request of each edit, the largest cosine of their keys over the weights that both change."""
    best: dict[tuple[int, int], float] = {}
    if not isinstance(edit, WeightEdit) or not isinstance(other, WeightEdit):
        return best
    for name in edit.records.keys() & other.records.keys():
        (mine, own), (theirs, other_own) = (
            _request_keys(edit.records[name]),
            _request_keys(other.records[name]),
        )
        for row, ours in zip((mine.mT @ theirs).tolist(), own, strict=True):
            for cosine, others in zip(row, other_own, strict=True):
                for i in ours:
                    for j in others:
                        best[i, j] = max(best.get((i, j), -1.0), cosine)
    return best


def _request_keys(record: Record) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Return the keys ``[d_in, n]`` of a record's requests, of length 1, and the requests of each.

    Keys that are terms of the cost, of statements that are to stay as they are, are left out.
    """
    chosen = [i for i in range(len(record.requests)) if not (record.in_cost and record.in_cost[i])]
    keys = torch.nn.functional.normalize(record.keys[:, chosen].double(), dim=0)
    return keys, [record.requests[i] for i in chosen]
