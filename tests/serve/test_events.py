"""How what the engine tells becomes events: without waking the loop more than it takes."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from tmac_py.generate import Step, Timings, Token
from tmac_py.model import Model
from tmac_py.openai_replies import Reply, ReplyShape, event
from tmac_py.server.post import Post


def steps() -> list[Step]:
    texts = ["The ", "", 'caf\u00e9 "\\"\n\x00', "\U0001f600", '"}]', "text", ""]
    return [
        Step(
            Token(text, 3 + i, -0.5, "length" if i == len(texts) - 1 else None, Timings(3, 0)),
            ((3, -0.5), (4, -1.5)),
        )
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"include_usage": True, "n": 2}, {"logprobs": True, "top_logprobs": 2}],
    ids=["plain", "two", "logprobs"],
)
def test_events_are_the_chunks(model: Model, chat: bool, options: dict[str, object]) -> None:
    reply = Reply(ReplyShape(chat=chat, **options), model.tokenizer, 'a "model"')
    again = Reply(ReplyShape(chat=chat, **options), model.tokenizer, 'a "model"')
    again._id, again._created = reply._id, reply._created
    for index in range(int(options.get("n", 1))):
        for step in steps():
            chunks = again.chunks(step, index)
            assert reply.events(step, index) == b"".join(map(event, chunks))
            for chunk in chunks:
                assert json.loads(event(chunk).removeprefix(b"data: ")) == chunk


def test_the_tokens_of_a_step_wake_the_loop_once() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        woken = 0
        wake = loop.call_soon_threadsafe

        def counted(*args: object) -> object:
            nonlocal woken
            woken += 1
            return wake(*args)  # type: ignore[arg-type]

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign, assignment]
        post = Post(loop)
        queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(8)]
        for i in range(3):
            for queue in queues:
                post.send(queue, i)
        assert woken == 1
        for i in range(3):
            assert [await queue.get() for queue in queues] == [i] * 8
        post.send(queues[0], 3)
        assert woken == 2
        assert await queues[0].get() == 3

    asyncio.run(main())


def test_nothing_sent_is_lost() -> None:
    n_threads, n = 4, 2000

    async def main() -> None:
        post = Post(asyncio.get_running_loop())
        queue: asyncio.Queue[tuple[int, int]] = asyncio.Queue()

        def send(thread: int) -> None:
            for i in range(n):
                post.send(queue, (thread, i))

        threads = [threading.Thread(target=send, args=(i,)) for i in range(n_threads)]
        for thread in threads:
            thread.start()
        found = [await asyncio.wait_for(queue.get(), 30) for _ in range(n_threads * n)]
        for thread in range(n_threads):
            assert [i for one, i in found if one == thread] == list(range(n))
        for one in threads:
            one.join()

    asyncio.run(main())


def test_a_loop_that_has_ended_is_an_error_each_time() -> None:
    loop = asyncio.new_event_loop()
    post, queue = Post(loop), asyncio.Queue[int]()
    post.send(queue, 0)  # it never comes round to this
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            post.send(queue, 1)
