"""What every HTTP request passes before anything else: host, origin, token, size and time of its body."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import anyio

from errata.serve.errors import ApiError, answer_to
from errata.serve.metrics import Metrics
from errata.serve.settings import ServerSettings
from errata.serve.tokens import is_loopback

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/health", "/"})
"""Paths that need no token: whether the server lives, and the page, which holds nothing of the model."""
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
ANSWERING = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Paths whose POST changes nothing."""


class Door:
    """Middleware around the whole application."""

    def __init__(self, app: App, settings: ServerSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or say why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = finished = False
        status = 0

        async def noting(message: Message) -> None:
            nonlocal started, finished, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-content-type-options", b"nosniff")]
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            try:
                self._check(scope)
                body = await self._body(scope, receive)
                await self.app(scope, _replay(body, receive), noting)
            except Exception as error:  # the last place where anything can be answered
                if not started:
                    await answer_to(error).response()(scope, receive, noting)
                elif not finished:  # the connection is closed then; else it was answered further in
                    answer_to(error)
        finally:
            self.metrics.requests.labels(_route(scope), str(status)).inc()

    # --- before ----------------------------------------------------------------------------

    def _check(self, scope: Scope) -> None:
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        self._check_host(headers)
        path, method = scope["path"], scope["method"]
        if path in OPEN and method in SAFE:
            return
        token = _bearer(headers.get("authorization"))
        tokens = self.settings.tokens
        if not tokens.may_read(token):
            raise ApiError(401, "send a token: Authorization: Bearer TOKEN", "invalid_api_key")
        if method not in SAFE and path not in ANSWERING and not tokens.may_write(token):
            raise ApiError(403, "this token may ask, but not change anything", "read_only")
        if method not in SAFE:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                # also what keeps a page of another site from posting without being asked for its origin first
                raise ApiError(415, "send a body of Content-Type: application/json", "unsupported_media_type")

    def _check_host(self, headers: dict[str, str]) -> None:
        """Refuse requests that a web page of another site has a browser send."""
        name = headers.get("host", "")
        local = is_loopback(self.settings.host) and not self.settings.tokens.required
        if local and not is_loopback(_hostname(name)):
            # a name to which an attacker's server gives the address 127.0.0.1
            raise ApiError(403, "this server answers to localhost and 127.0.0.1 alone", "unknown_host")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != name.lower():
            raise ApiError(403, "pages of other sites may not use this server", "foreign_origin")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Read the whole body. Raises ApiError: 413 where it is too large, 408 where it takes too long."""
        most = self.settings.most_body
        for name, value in scope["headers"]:
            if name.lower() == b"content-length" and (not value.isdigit() or int(value[:20]) > most):
                raise ApiError(413, f"a body may have {most:,} bytes", "body_too_large")
        parts: list[bytes] = []
        size = 0
        try:
            with anyio.fail_after(self.settings.read_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(
                            400, "the connection was closed before the body was there", "disconnected"
                        )
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise ApiError(413, f"a body may have {most:,} bytes", "body_too_large")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ApiError(
                408, f"the body did not arrive within {self.settings.read_timeout:g} s", "slow_request"
            ) from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read already, and after it what comes from the connection."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _bearer(header: str | None) -> str | None:
    scheme, _, token = (header or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _hostname(header: str) -> str:
    """Return the name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _route(scope: Scope) -> str:
    """Return the pattern that a path matched, so that paths cannot make counters without end."""
    route = scope.get("route")
    return getattr(route, "path", "none")
