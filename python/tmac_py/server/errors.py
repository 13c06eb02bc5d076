"""Errors of the HTTP interface, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from tmac_py.errors import ContextError, OptionError, TmacError
from tmac_py.server.jobs import BusyError, CancelledError


class ApiError(Exception):
    """One that a client gets to see.

    Attributes:
        status: of HTTP.
        message: one line.
        code: a word that programs can compare, or None.
        param: the field of the request that is meant, or None.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def to_json(self) -> dict[str, Any]:
        """The object that OpenAI's clients read."""
        if self.status >= 500:
            kind = "server_error"
        else:
            kind = {
                401: "authentication_error",
                404: "not_found_error",
                429: "rate_limit_error",
            }.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        """What is sent."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status in (429, 503):
            headers["Retry-After"] = "1"
        return JSONResponse(self.to_json(), self.status, headers)


def invalid(message: str, param: str | None = None) -> ApiError:
    """A request that is not allowed."""
    return ApiError(400, message, param=param, code="invalid_value")


def to_api_error(error: Exception) -> ApiError:
    """What a client is told of ``error``; of faults of the server no more than that they are."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, OptionError):
        return invalid(str(error))
    if isinstance(error, BusyError):
        return ApiError(429, str(error), code="too_many_requests")
    if isinstance(error, CancelledError):
        return ApiError(503, str(error), code="cancelled")
    if isinstance(error, TmacError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed on this request", code="internal_error")
