"""Generations for asyncio: they run in threads of the loop's executor, and end with their tasks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from functools import partial
from typing import TypeVar

from tmac_py.cancelling import AnyOf, Cancel, check_cancel
from tmac_py.options import GenerationOptions

T = TypeVar("T")


async def run(work: Callable[[Cancel], T]) -> T:
    """What ``work`` returns, computed in a thread.

    When the task is cancelled, what ``work`` was given is set; the task ends when it has returned.
    """
    stop = threading.Event()
    return await _call(partial(work, stop), stop)


async def iterate(start: Callable[[Cancel], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
    """What the generator that ``start`` makes yields; each item is computed in a thread.

    When the task is cancelled or the iteration left, what ``start`` was given is set, and the
    generator closed.
    """
    stop = threading.Event()
    items = await _call(partial(start, stop), stop)
    try:
        while (item := await _call(partial(next, items, None), stop)) is not None:
            yield item
    finally:
        items.close()


def stoppable(options: GenerationOptions, stop: Cancel) -> GenerationOptions:
    """``options`` of a generation that ``stop`` ends too; OptionError for a wrong ``cancel``."""
    cancel = options.get("cancel")
    check_cancel(cancel)
    return {**options, "cancel": AnyOf(cancel, stop)}


async def _call(work: Callable[[], T], stop: threading.Event) -> T:
    """Run ``work`` in a thread, to its end: when the task is cancelled, ``stop`` hastens it."""
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.set()
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        future.exception()
        raise
