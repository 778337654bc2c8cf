"""Requests that contradict or repeat those of edits in place: by their texts, and by their keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from errata.errors import ConflictError
from errata.ledger import facts
from errata.ledger.events import SHORT
from errata.ledger.settings import Policy
from errata.ledger.state import State
from errata.ledger.store import Ledger

Sort = Literal["contradiction", "repetition", "near-duplicate"]


@dataclass(frozen=True)
class Conflict:
    """Two requests about one fact, one of them of an edit in place."""

    sort: Sort
    """``contradiction``: another target; ``repetition``: the same one; ``near-duplicate``: other words, nearly the
    same key."""
    request: int
    """Number of the new request, from 0."""
    name: str
    """Its id, else its prompt with the subject."""
    target: str
    other: str
    """Digest of the edit in place."""
    other_request: int
    """Number of that edit's request, from 0."""
    other_name: str
    other_target: str
    similarity: float | None = None
    """Cosine of the two keys, of a near-duplicate."""

    def to_dict(self) -> dict[str, Any]:
        """Return the conflict as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        other = f"request {self.other_name!r} -> {self.other_target!r} of edit {self.other[:SHORT]}"
        how = {
            "contradiction": "contradicts",
            "repetition": "repeats",
            "near-duplicate": "has nearly the key of",
        }
        cosine = "" if self.similarity is None else f" (cosine {self.similarity:.3f})"
        return f"request {self.name!r} -> {self.target!r} {how[self.sort]} {other}{cosine}"


def find(ledger: Ledger, state: State, requests: Sequence[Mapping[str, Any]]) -> list[Conflict]:
    """Return the conflicts of new requests with those of the edits in place that have the same subject and prompt."""
    found: list[Conflict] = []
    active = set(state.active)
    for number, matches in ledger.find_facts(requests).items():
        for match in matches:
            if match.same_prompt and match.edit in active:
                one = requests[number]
                other = state.edits[match.edit].requests[match.request]
                sort: Sort = "repetition" if _target(one) == _target(other) else "contradiction"
                found.append(between(sort, number, one, match.edit, match.request, other))
    return found


def between(
    sort: Sort, number: int, request: Mapping[str, Any], edit: str, other_number: int, other: Mapping[str, Any],
    similarity: float | None = None,
) -> Conflict:  # fmt: skip
    """Return the conflict of two requests as plain data."""
    return Conflict(
        sort, number, name_of(request), request.get("target", ""), edit, other_number, name_of(other),
        other.get("target", ""), similarity,
    )  # fmt: skip


def to_replace(conflicts: Sequence[Conflict], policy: Policy) -> list[Conflict]:
    """Return the conflicts whose edits are to give way under a policy.

    Raises ConflictError, naming both sides of all of them, under ``error``. A near-duplicate may be another fact, so it
    is reported under every policy and gives way under none.
    """
    same_fact = [one for one in conflicts if one.sort != "near-duplicate"]
    if same_fact and policy == "error":
        lines = "\n".join(map(str, same_fact))
        raise ConflictError(
            f"{lines}\nuse --conflicts replace to take those out, --conflicts keep to have both, the newer on top"
        )
    return same_fact if policy == "replace" else []


def name_of(request: Mapping[str, Any]) -> str:
    """Return how a request is called in messages: its id, else its prompt with the subject."""
    if request.get("id"):
        return str(request["id"])
    if "prompt" not in request:
        return f"{request['concept']} / {request['replacement']}"
    return str(request["prompt"]).replace("{}", str(request["subject"]), 1)


def _target(request: Mapping[str, Any]) -> str:
    return facts.plain(str(request.get("target", request.get("digest", ""))))
