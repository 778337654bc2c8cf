"""/v1/models, /v1/edits and /v1/log: what can be asked for, and how it is changed."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from errata.ledger.recording import Order
from errata.serve import schemas
from errata.serve.desk import Desk, attempt_document, recording_document
from errata.serve.errors import ApiError
from errata.types import Request as Fact

SHOWN = 200
"""Most events of the ledger in a log."""


def routes(desk: Desk) -> APIRouter:
    """Return the routes about models and edits."""
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    async def models() -> dict[str, Any]:
        """List the names that can be asked for, and the edits of each."""
        named = desk.catalogue.models()
        return {"object": "list", "data": [_model(name, edits) for name, edits in named.items()]}

    @router.get("/v1/models/{name:path}", response_model=None)
    async def model(name: str) -> dict[str, Any]:
        """Describe one name."""
        return _model(name, desk.catalogue.choose(name).edits)

    @router.get("/v1/edits", response_model=None)
    async def edits() -> dict[str, Any]:
        """List all edits, and which of them are in place."""
        now = desk.catalogue
        return {
            "object": "list", "revision": now.revision, "active": list(now.active), "ledger": desk.ledger is not None,
            "data": [one.to_dict() for one in now.entries.values()],
        }  # fmt: skip

    @router.get("/v1/log", response_model=None)
    async def log() -> dict[str, Any]:
        """List the newest events of the ledger, the newest first."""
        ledger = desk.ledger
        events = [] if ledger is None else await run_in_threadpool(ledger.events)
        return {"object": "list", "data": [event.to_dict() for event in reversed(events[-SHOWN:])]}

    @router.get("/v1/edits/{name}", response_model=None)
    async def edit(name: str) -> dict[str, Any]:
        """Describe one edit."""
        return desk.catalogue.entry(name).to_dict()

    _add_orders(router, desk)
    return router


def _add_orders(router: APIRouter, desk: Desk) -> None:
    """Add the routes that change the ledger."""

    @router.post("/v1/edits", response_model=None)
    async def make(body: schemas.NewEdit) -> JSONResponse:
        """Fit an edit, measure it and apply it; 409 with what was measured if the guard refused some of it."""
        facts = [Fact(**one.model_dump(exclude_none=True)) for one in body.requests]
        order = Order(
            body.method, body.settings, body.seed, _known(desk, body.after), reason=body.reason, source=body.source,
            author=body.author, guard=body.guard, halve=body.halve, conflicts=body.conflicts,
        )  # fmt: skip
        document = recording_document(await asyncio.wrap_future(desk.make(facts, order)))
        return _outcome(desk, document, passed=document["passed"])

    @router.post("/v1/edits/{name}/apply", response_model=None)
    async def apply(name: str, body: schemas.Applying) -> JSONResponse:
        """Put an edit in place again, measured anew; 409 with what was measured if the guard refused it."""
        entry = desk.catalogue.entry(name)
        order = Order(
            entry.method, reason=body.reason, author=body.author, guard=body.guard, conflicts=body.conflicts
        )
        document = attempt_document(await asyncio.wrap_future(desk.apply(entry.digest, order)))
        return _outcome(desk, document, passed=document["applied"])

    @router.post("/v1/edits/{name}/revert", response_model=None)
    async def revert(name: str, body: schemas.Order) -> dict[str, Any]:
        """Take an edit off."""
        entry = desk.catalogue.entry(name)
        event = await asyncio.wrap_future(desk.revert(entry.digest, reason=body.reason, author=body.author))
        return {"id": entry.digest, "event": event, "revision": desk.catalogue.revision}

    @router.post("/v1/edits/{name}/verify", response_model=None)
    async def verify(name: str, body: schemas.Order) -> dict[str, Any]:
        """Measure an edit beside the others in place, and record what was measured."""
        entry = desk.catalogue.entry(name)
        verdict = await asyncio.wrap_future(desk.verify(entry.digest, reason=body.reason, author=body.author))
        return {"id": entry.digest, **verdict}


def _known(desk: Desk, after: str | None) -> str | None:
    """Return the id of an edit to continue. Raises ApiError for one that is not in place."""
    if after is None:
        return None
    digest = desk.catalogue.entry(after).digest
    if digest not in desk.catalogue.active:
        raise ApiError(
            409, f"edit {digest} is not in place, so nothing can continue it", "not_in_place", param="after"
        )
    return digest


def _outcome(desk: Desk, document: dict[str, Any], *, passed: bool) -> JSONResponse:
    """Return what became of an order; a refusal by the guard is an error, with all that was measured beside it."""
    document = {**document, "revision": desk.catalogue.revision}
    if passed:
        return JSONResponse(document)
    message = "the guard refused what is out of its bounds; it is recorded, and not in place"
    return ApiError(409, message, "guard_refused", more=document).response()


def _model(name: str, edits: tuple[str, ...]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "errata", "edits": list(edits)}
