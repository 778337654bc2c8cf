"""The application: its routes behind the door, and what starts and ends with it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from errata.errors import ErrataError, brief
from errata.serve import completions, editing, ui
from errata.serve.asking import Gate
from errata.serve.desk import Desk
from errata.serve.door import App, Door
from errata.serve.engine import Engine
from errata.serve.errors import ApiError, answer_to
from errata.serve.metrics import CONTENT_TYPE
from errata.serve.settings import ServerSettings

LOOK = 2.0
"""Seconds between two looks whether another process has changed the ledger."""
SHOWN = 5
"""Most problems of a body that are listed."""
LOG = logging.getLogger("errata.serve")


def make_app(desk: Desk, engine: Engine, settings: ServerSettings) -> App:
    """Return the application; the engine runs from its startup to its shutdown."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        desk.serve_with(engine)
        await run_in_threadpool(lambda: engine.prepare(desk.catalogue.active).exception())
        watcher = asyncio.create_task(_watch(desk))
        yield
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        await run_in_threadpool(desk.close)
        await run_in_threadpool(engine.stop)

    # no pages of documentation: they would load scripts from elsewhere
    app = FastAPI(title="errata", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=life)
    app.include_router(completions.routes(desk, Gate(engine, settings)))
    app.include_router(editing.routes(desk))
    if settings.page:
        app.include_router(ui.routes(settings.runs))
    _add_health(app, desk, engine)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ErrataError, _answer)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(Exception, _answer)
    return Door(app, settings, engine.metrics)


def _add_health(app: FastAPI, desk: Desk, engine: Engine) -> None:
    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Say whether the model is being run."""
        alive = engine.alive
        body = {"status": "ok" if alive else "stopped", "revision": desk.catalogue.revision}
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        """Return the server's counters as Prometheus reads them."""
        return Response(engine.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def _watch(desk: Desk) -> None:
    """Take up what other processes do to the ledger."""
    while desk.ledger is not None:
        await asyncio.sleep(LOOK)
        try:
            await run_in_threadpool(desk.publish)
        except ErrataError as error:  # a ledger that cannot be read now may be later
            LOG.error("%s", error)


async def _invalid(_: Any, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems: list[str] = []
    fields: list[str] = []
    for one in error.errors()[:SHOWN]:
        where = ".".join(part for part in one["loc"] if isinstance(part, str) and part != "body")
        fields.append(where)
        text = one["msg"].removeprefix("Value error, ")
        problems.append(brief(f"{where}: {text}" if where else text, 300))
    param = fields[0] if fields and fields[0] else None
    return ApiError(400, "; ".join(problems), "invalid_body", param=param).response()


async def _http(_: Any, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code, "invalid_body")
    return ApiError(error.status_code, str(error.detail), code).response()


async def _answer(_: Any, error: Exception) -> Response:
    return answer_to(error).response()
