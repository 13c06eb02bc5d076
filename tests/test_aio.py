"""Generations in asyncio: the loop stays free, and what is left stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing

import numpy as np
import pytest

import tiny_model as tiny
from tmac_py import Model, OptionError
from tmac_py.decoding import PREFILL_CHUNK

OPTIONS = {"seed": 2, "temperature": 1.0, "max_tokens": 20, "logit_bias": {2: -np.inf}}
LONG = (np.arange(4 * PREFILL_CHUNK) % 250 + 3).tolist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("aio") / "tiny.lut"
    tiny.write_tiny_model(
        path, max_position_embeddings=1500, special=("embed",), quantize=tiny.flat_head
    )
    with Model.load(path, threads=1) as model:
        yield model


def test_the_same_tokens(model: Model) -> None:
    async def main() -> None:
        answer = model.generate("the cat", **OPTIONS)
        tokens = [token async for token in model.astream("the cat", **OPTIONS)]
        assert tuple(token.id for token in tokens) == answer.ids
        several = await asyncio.gather(*(model.agenerate("the cat", **OPTIONS) for _ in range(5)))
        assert [result.ids for result in several] == [answer.ids] * 5
        assert several[0].seed == OPTIONS["seed"]

    asyncio.run(main())


def test_the_loop_is_free_while_tokens_are_computed(model: Model) -> None:
    """The token waits for what only the loop does."""

    async def main() -> None:
        done = threading.Event()

        def processor(_ids: np.ndarray, _logits: np.ndarray) -> None:
            assert done.wait(60)

        asyncio.get_running_loop().call_later(0.01, done.set)
        async for _ in model.astream("the cat", logits_processor=processor, **OPTIONS):
            break
        done.clear()
        asyncio.get_running_loop().call_later(0.01, done.set)
        await model.agenerate("the cat", logits_processor=processor, **OPTIONS)

    asyncio.run(main())


def test_leaving_the_loop_stops_the_work(model: Model) -> None:
    calls = []

    async def main() -> None:
        tokens = model.astream(
            "the cat", logits_processor=lambda *_: calls.append(1), draft="none", **OPTIONS
        )
        async with aclosing(tokens):
            async for token in tokens:
                if token.n_gen == 3:
                    break
        assert len(calls) == 3

    asyncio.run(main())
    assert len(calls) == 3


@pytest.mark.parametrize("streaming", [True, False])
def test_a_cancelled_task_stops_within_the_prompt(model: Model, streaming: bool) -> None:
    seen = []

    async def consume(progress: object) -> None:
        if not streaming:
            await model.agenerate(LONG, progress=progress)
            return
        async for _ in model.astream(LONG, progress=progress):
            pass

    async def main() -> None:
        loop = asyncio.get_running_loop()

        async def cancel() -> None:
            task.cancel()
            for _ in range(10):  # the task has seen it
                await asyncio.sleep(0)

        def progress(done: int, _total: int) -> None:
            seen.append(done)
            asyncio.run_coroutine_threadsafe(cancel(), loop).result(60)

        task = asyncio.create_task(consume(progress))
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen == [PREFILL_CHUNK]
    assert len(model.generate("the cat", **OPTIONS).ids) == 20


def test_errors_and_a_cancel_of_ones_own(model: Model) -> None:
    async def main() -> None:
        with pytest.raises(OptionError, match="temperature is -1"):
            await model.agenerate("the cat", temperature=-1)
        with pytest.raises(OptionError, match="temperature is -1"):
            await anext(model.astream("the cat", temperature=-1))
        with pytest.raises(OptionError, match="cancel is 5; allowed"):
            await model.agenerate("the cat", cancel=5)
        cancel = threading.Event()
        tokens = []
        async for token in model.astream("the cat", cancel=cancel, **OPTIONS):
            tokens.append(token)
            if len(tokens) == 4:
                cancel.set()
        assert 4 <= len(tokens) < 20
        assert (await model.agenerate("the cat", cancel=cancel)).finish_reason == "cancelled"

    asyncio.run(main())


def test_a_session_that_was_left_goes_on(model: Model) -> None:
    async def main() -> None:
        session = model.new_session()
        whole = await session.agenerate("the cat", **OPTIONS)
        assert whole.ids == model.generate("the cat", **OPTIONS).ids
        tokens = session.astream("the cat", draft="none", **OPTIONS)
        async with aclosing(tokens):
            async for token in tokens:
                if token.n_gen == 3:
                    break
        assert session.ids == (*model.check_prompt("the cat").tolist(), *whole.ids[:2])
        again = await session.agenerate("the cat", **OPTIONS)
        assert again.ids == whole.ids

    asyncio.run(main())
