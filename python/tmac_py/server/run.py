"""The server as a process: a socket, uvicorn, signals."""

from __future__ import annotations

import asyncio
import math
import socket
import sys
from collections.abc import Callable
from ipaddress import ip_address

import uvicorn
from starlette.applications import Starlette

from tmac_py.errors import TmacError

IDLE_SECONDS = 30
"""An open connection without a request is closed after these."""

UNREAD_SECONDS = 3
"""For clients to read the end of an answer when the server ends."""


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket of that address, which does not listen yet; port 0 takes a free one.

    Raises TmacError: the address is in use, not this machine's, or not allowed.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(kind, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise TmacError(f"{host}: {_reason(error)}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise TmacError(f"{host}:{port}: {_reason(error)}; choose another --port") from error
    return listener


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach ``host``."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    app: Starlette,
    listener: socket.socket,
    *,
    grace: float,
    started: Callable[[], None],
    cut: Callable[[], None],
) -> None:
    """Answer until SIGINT or SIGTERM. Afterwards the signal is raised again, for the old handlers.

    Args:
        app: what answers.
        listener: from :func:`bind`.
        grace: seconds that answers under way then have to end.
        started: called when connections are accepted.
        cut: called when these seconds are over; it has to end what is still under way.
    """
    # The engine's thread waits this long for the interpreter when a step is done; 5 ms would be
    # as long as the step.
    sys.setswitchinterval(0.0005)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=math.ceil(grace) + UNREAD_SECONDS,
    )
    server = _Server(config, started, cut, grace)
    asyncio.run(server.serve(sockets=[listener]))


class _Server(uvicorn.Server):
    """Says when it has started, and when answers have to end."""

    def __init__(
        self,
        config: uvicorn.Config,
        started: Callable[[], None],
        cut: Callable[[], None],
        grace: float,
    ) -> None:
        super().__init__(config)
        self._when_started = started
        self._cut = cut
        self._grace = grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._when_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        late = asyncio.get_running_loop().call_later(self._grace, self._cut)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            late.cancel()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
