"""What goes wrong, as HTTP says it: bodies in the shape of OpenAI's errors, and never a stack trace."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from typing import Any

import torch
from starlette.responses import JSONResponse

from errata.errors import ConflictError, ErrataError, StateChanged
from errata.serve.catalogue import UnknownModel
from errata.serve.engine import Stopped

LOG = logging.getLogger("errata.serve")
TYPES: Mapping[int, str] = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    429: "rate_limit_error", 504: "timeout_error",
}  # fmt: skip


class ApiError(Exception):
    """An answer other than success."""

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, more: Mapping[str, Any] | None = None
    ) -> None:  # fmt: skip
        """``param``: the field of the body that is wrong; ``more``: further fields of the answer."""
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.more = status, message, code, param, more or {}

    def body(self) -> dict[str, Any]:
        """Return the answer's document."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error, **self.more}

    def response(self) -> JSONResponse:
        """Return the answer."""
        headers: dict[str, str] = {}
        if self.status in (429, 503):
            headers["retry-after"] = "1"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def api_error(error: Exception) -> ApiError | None:
    """Return what is answered for an error that was foreseen; None for one that was not."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UnknownModel):
        return ApiError(404, str(error), "model_not_found", param="model")
    if isinstance(error, Stopped):
        return ApiError(503, str(error), "shutting_down")
    if isinstance(error, (ConflictError, StateChanged)):
        return ApiError(409, str(error), "conflict")
    if isinstance(error, ErrataError):
        return ApiError(400, str(error), "invalid_request")
    if isinstance(error, torch.OutOfMemoryError):
        return ApiError(503, "the model's device has not enough memory for this now", "out_of_memory")
    return None


def answer_to(error: Exception) -> ApiError:
    """Return what is answered for any error: one that was not foreseen gets an id, under which the log has the rest."""
    known = api_error(error)
    if known is not None:
        return known
    number = uuid.uuid4().hex[:12]
    LOG.error("error %s", number, exc_info=error)
    return ApiError(
        500, f"internal error {number}; the server's log has more under this id", "internal_error"
    )
