"""From the engine's thread to an event loop: one call for all that a step tells."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, TypeVar

T = TypeVar("T")


class Post:
    """Puts what other threads send into queues of one event loop, in order.

    Waking the loop takes a system call and, while the sender has the interpreter, switches of
    threads. So the loop is woken once for all that is sent before it comes round to it.

    Attributes:
        loop: of the queues.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._sent: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._woken = False

    def send(self, queue: asyncio.Queue[T], item: T) -> None:
        """Put ``item`` into ``queue``; from any thread. RuntimeError if the loop has ended."""
        self._sent.append((queue, item))
        if not self._woken or self.loop.is_closed():  # it may end before it comes round
            self._woken = True
            try:
                self.loop.call_soon_threadsafe(self._deliver)
            except RuntimeError:
                self._woken = False
                raise

    def _deliver(self) -> None:
        self._woken = False  # before looking: what is sent from now on wakes the loop again
        while self._sent:
            queue, item = self._sent.popleft()
            queue.put_nowait(item)
