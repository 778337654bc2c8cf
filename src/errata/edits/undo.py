"""Take single requests out of an edit that acts at run time, as far as its entries can be told apart by request.

An entry belongs to one request where there are as many entries as requests. Added neurons name their requests in the
edit's state. A memory's log tells what a request did to the entries of earlier ones:

add      nothing
replace  ``other`` takes no prompt any more; its name was ``subject``
expand   ``entry`` is that of an earlier request, and was trained further
split    the radius of ``other`` shrank from ``radius``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from errata.edits.edit import timestamp
from errata.edits.memory import Intervention, MemoryEdit
from errata.edits.model import ModelEdit
from errata.edits.prompt import PromptEdit
from errata.edits.routers._router import Router
from errata.edits.runtime import RuntimeEdit
from errata.errors import EditError

E = TypeVar("E", bound=RuntimeEdit)


def without(edit: RuntimeEdit, places: Sequence[int]) -> RuntimeEdit:
    """Return an edit without some requests, by their index from 0; the entries of the others stay as they are.

    Raises EditError where an entry serves requests of both sorts, or has been changed by a later one.
    """
    count = len(edit.provenance.requests)
    rest = [i for i in range(count) if i not in set(places)]
    if isinstance(edit, MemoryEdit) and _has_blocks(edit):
        return _provenance(_without_blocks(edit, places), rest, edit)
    if isinstance(edit, MemoryEdit) and "owners" in edit.state:
        return _provenance(_without_neurons(edit, rest), rest, edit)
    if _entries(edit) != count:
        raise EditError(
            f"the {count} requests of this edit have {_entries(edit)} entries in common, so some of them cannot be "
            "taken out: fit the others again"
        )
    if isinstance(edit, PromptEdit):
        texts = tuple(edit.contexts[i] for i in rest)
        suffixes = tuple(edit.suffixes[i] for i in rest) if edit.suffixes else ()
        return _provenance(
            replace(edit, contexts=texts, suffixes=suffixes, router=edit.router.select(rest)), rest, edit
        )
    if isinstance(edit, ModelEdit):
        texts = tuple(edit.contexts[i] for i in rest)
        return _provenance(replace(edit, contexts=texts, router=edit.router.select(rest)), rest, edit)
    assert isinstance(edit, MemoryEdit)
    return _provenance(_without_entries(edit, rest), rest, edit)


def _has_blocks(edit: MemoryEdit) -> bool:
    """Whether the entries of an edit are blocks, each of which may serve several requests."""
    return edit.router.tensors().get("blocks") is not None or edit.interventions[0].operation == "side"


def _entries(edit: RuntimeEdit) -> int:
    if isinstance(edit, (PromptEdit, ModelEdit)):
        return len(edit.contexts)
    assert isinstance(edit, MemoryEdit)
    return edit.entries


def _provenance(edit: E, rest: Sequence[int], before: RuntimeEdit) -> E:
    requests = tuple(before.provenance.requests[i] for i in rest)
    record = replace(before.provenance, requests=requests, parents=(before.digest,), created=timestamp())
    return replace(edit, provenance=record)  # type: ignore[call-arg]


def _without_blocks(edit: MemoryEdit, requests: Sequence[int]) -> MemoryEdit:
    """Drop blocks with all their requests. Raises EditError for a part of a block."""
    owners = [int(block) for block in edit.state["owners"]]
    dropped = {owners[request] for request in requests}
    together = [i for i, block in enumerate(owners) if block in dropped]
    if set(together) != set(requests):
        raise EditError(
            f"requests {', '.join(str(i + 1) for i in together)} (counted from 1) share their blocks, and a block "
            "can be dropped only with all its requests: name all of these, or fit the others again"
        )
    rest = [i for i in range(len(owners)) if i not in set(requests)]
    entries = [i for i in range(edit.entries) if i not in dropped]
    number = {request: i for i, request in enumerate(rest)}
    block = {entry: i for i, entry in enumerate(entries)}
    return replace(
        edit,
        interventions=tuple(
            replace(one, payload={name: tensor[entries] for name, tensor in one.payload.items()})
            for one in edit.interventions
        ),
        router=edit.router.without(sorted(dropped)),
        state={**edit.state, "owners": torch.tensor([block[owners[i]] for i in rest])},
        log=tuple(
            {**entry, "request": number[entry["request"]], "block": block[entry["block"]]}
            for entry in edit.log
            if entry["request"] in number
        ),
    )


def _without_neurons(edit: MemoryEdit, rest: Sequence[int]) -> MemoryEdit:
    """Drop the neurons of requests; those that a batch shares go with all of it."""
    (intervention,) = edit.interventions
    owners = edit.state["owners"]
    starts = sorted(set(map(int, owners)))
    ends = [*starts[1:], len(edit.provenance.requests)]
    kept = set(rest)
    for start, end in zip(starts, ends, strict=True):
        batch = set(range(start, end))
        if batch & kept and not batch <= kept:
            raise EditError(
                f"requests {start + 1} to {end} share their neurons: take all of them out, or fit the others again"
            )
    chosen = torch.tensor([int(owner) in kept for owner in owners], dtype=torch.bool)
    payload = {name: tensor[:, chosen] for name, tensor in intervention.payload.items()}
    numbers = {old: new for new, old in enumerate(rest)}
    count = len(edit.provenance.requests)  # what else is kept has a row for each request
    state = {n: t[list(rest)] if len(t) == count else t for n, t in edit.state.items()}
    state["owners"] = torch.tensor([numbers[int(o)] for o in owners[chosen]])
    return replace(edit, interventions=(replace(intervention, payload=payload),), state=state)


def _without_entries(edit: MemoryEdit, rest: Sequence[int]) -> MemoryEdit:
    """Drop entries that belong to one request each, and what they did to others by the log."""
    router, log = edit.router, edit.log
    if log:
        router = _restored(router, log, rest)
        numbers = {old: new for new, old in enumerate(rest)}
        log = tuple(_renumbered(entry, numbers) for entry in log if entry["request"] in numbers)
    chosen = torch.tensor(list(rest))
    interventions = tuple(replace(one, payload=_payload(one, chosen)) for one in edit.interventions)
    # with a log, the state has a row for each entry; without one, what the whole memory has in common
    state: Mapping[str, Tensor] = {n: t[chosen] for n, t in edit.state.items()} if log else edit.state
    return replace(edit, interventions=interventions, router=router.select(rest), state=state, log=log)


def _payload(intervention: Intervention, chosen: Tensor) -> dict[str, Tensor]:
    """Return the tensors of some entries; of a low rank that only dropped ones had, the zeros are left out."""
    payload = {name: tensor[chosen] for name, tensor in intervention.payload.items()}
    if intervention.operation == "lowrank":
        used = (payload["left"] != 0).any(1).any(0) & (payload["right"] != 0).any(2).any(0)  # [r]
        rank = int(used.nonzero().max()) + 1 if bool(used.any()) else 1
        payload = {"left": payload["left"][..., :rank], "right": payload["right"][:, :rank]}
    return payload


def _restored(router: Router, log: Sequence[Mapping[str, Any]], rest: Sequence[int]) -> Router:
    """Return the router with what dropped requests did to entries that stay undone. Raises EditError."""
    kept = set(rest)
    for entry in log:
        if entry["action"] == "expand":
            raise EditError(
                f"request {entry['request'] + 1} trained an entry of an earlier request further, so single requests "
                "cannot be taken out: fit the others again"
            )
    for entry in reversed([e for e in log if e["request"] not in kept]):
        touching = [e for e in log if e.get("other") == entry["entry"] and e["request"] in kept]
        splits = [e for e in touching if e["action"] == "split"]
        if splits:
            raise EditError(_touched(entry["request"], splits[0]["request"]))
        other = entry.get("other")
        if other not in kept:
            continue
        if entry["action"] == "replace" and not touching:
            phrases = list(router.facts()["phrases"])
            phrases[other] = entry["subject"]
            router = replace(router, phrases=tuple(phrases))  # type: ignore[call-arg]
        elif entry["action"] == "split":
            later = [e for e in log if e.get("other") == other and e["request"] > entry["request"]]
            if any(e["request"] in kept for e in later):
                raise EditError(_touched(entry["request"], later[0]["request"]))
            radii = router.tensors()["radii"].clone()
            radii[other] = entry["radius"]
            router = replace(router, radii=radii)  # type: ignore[call-arg]
    return router


def _touched(number: int, later: int) -> str:
    return (
        f"request {later + 1} changed an entry that request {number + 1} made or changed: take out both, or fit the "
        "others again"
    )


def _renumbered(entry: Mapping[str, Any], numbers: Mapping[int, int]) -> Mapping[str, Any]:
    plain = {**entry, "request": numbers[entry["request"]], "entry": numbers[entry["entry"]]}
    if "other" in entry and entry["other"] not in numbers:  # what it replaced is gone
        kept = {name: plain[name] for name in plain if name not in ("other", "subject", "radius")}
        return {**kept, "action": "add"}
    return {**plain, "other": numbers[entry["other"]]} if "other" in entry else plain
