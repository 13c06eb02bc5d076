"""The server as a process: a socket, uvicorn, signals."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from ipaddress import ip_address

import uvicorn
from starlette.applications import Starlette

from tmac_py.errors import TmacError

IDLE_SECONDS = 30
"""An open connection without a request is closed after these."""


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
    app: Starlette, listener: socket.socket, *, grace: float, started: Callable[[], None]
) -> None:
    """Answer until SIGINT or SIGTERM; answers under way then have ``grace`` seconds to end.

    ``started`` is called when connections are accepted. Afterwards the signal is raised again, for
    the handlers that were there before.
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
        timeout_graceful_shutdown=max(1, round(grace)),
    )
    server = _Server(config, started)
    asyncio.run(server.serve(sockets=[listener]))


class _Server(uvicorn.Server):
    """Says when it has started."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._when_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._when_started()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
