"""What stands before every route: the key, the names this server goes by, sizes, errors."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from tmac_py.server.errors import ApiError, invalid, to_api_error

BODY_SECONDS = 30.0
"""For a request's body to arrive."""

Handler = Callable[[Request], Awaitable[Response]]

log = logging.getLogger(__name__)


def guarded(handler: Handler, api_keys: tuple[bytes, ...]) -> Handler:
    """``handler`` behind the key, its errors as answers."""

    async def guarded_handler(request: Request) -> Response:
        try:
            _check_key(request, api_keys)
            return await handler(request)
        except ClientDisconnect:
            return Response(status_code=499)
        except Exception as error:
            seen = to_api_error(error)
            if seen.status == 500:
                log.exception("%s %s", request.method, request.url.path)
            return seen.response()

    return guarded_handler


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The body of a request: a JSON object of at most ``max_bytes``.

    Anything but application/json is refused, so that no page of another site can post here without
    a browser asking first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind!r}; allowed: application/json")
    try:
        data = await asyncio.wait_for(_body(request, max_bytes), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s") from None
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise invalid("the body is not a JSON object")
    return body


async def _body(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"the body is larger than {max_bytes} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > max_bytes:
        raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:
            raise too_large
    return bytes(data)


def _check_key(request: Request, api_keys: tuple[bytes, ...]) -> None:
    """ApiError unless the request carries one of the keys, where there are any."""
    if not api_keys:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    same = [hmac.compare_digest(given.encode("latin-1"), key) for key in api_keys]
    if not any(same):
        raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
