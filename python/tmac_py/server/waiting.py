"""What the engine's thread tells, awaited by a request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TypeVar

from starlette.requests import Request as HttpRequest

from tmac_py.server.embedding_job import EmbeddingJob
from tmac_py.server.engine import Engine
from tmac_py.server.errors import ApiError
from tmac_py.server.jobs import Job
from tmac_py.server.post import Post

T = TypeVar("T")

Submit = Callable[[Callable[[T | Exception], None]], Job | EmbeddingJob]
"""Gives the engine a job that tells what it is called with."""


async def engine_events(
    engine: Engine,
    post: Post,
    request: HttpRequest,
    seconds: float,
    submits: Sequence[Submit[T]],
) -> AsyncGenerator[tuple[int, T], None]:
    """What the jobs of one request tell, each with the number of the job; without end.

    When the generator is closed, the client has gone away or time is up, the jobs are cancelled.

    Args:
        engine: what computes them.
        post: brings what they tell to the running loop.
        request: the client's.
        seconds: after these it ends with an error.
        submits: what begins the jobs.

    Raises:
        ApiError: time is up.
        Exception: what a job ended with, or could not begin with.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, T | Exception]] = asyncio.Queue()
    jobs: list[Job | EmbeddingJob] = []

    def teller(index: int) -> Callable[[T | Exception], None]:
        def tell(item: T | Exception) -> None:
            post.send(events, (index, item))

        return tell

    def give_up(_: object = None) -> None:
        for job in jobs:
            engine.cancel(job)

    try:
        for index, submit in enumerate(submits):
            jobs.append(submit(teller(index)))
    except BaseException:
        give_up()
        raise
    watch = asyncio.create_task(_until_gone(request))
    watch.add_done_callback(give_up)
    late = loop.call_later(
        seconds,
        events.put_nowait,
        (0, ApiError(504, f"no complete answer within {seconds:g} s", code="timeout")),
    )
    try:
        while True:
            index, item = await events.get()
            if isinstance(item, Exception):
                raise item
            yield index, item
    finally:
        late.cancel()
        watch.cancel()
        give_up()


async def _until_gone(request: HttpRequest) -> None:
    """Return when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
