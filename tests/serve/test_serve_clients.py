"""Several clients of ``tmac serve``: those who share it, wait, and go away."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

from serving import (
    NO_END,
    chat_answer,
    metric,
    openai_client,
    running,
    send,
    stalled,
    unread,
    wait_for,
)
from tmac_py.model import Model
from tmac_py.server.openai_requests import RequestReader


def test_many_clients_get_what_each_gets_alone(port: int, model: Model) -> None:
    chats = [[{"role": "user", "content": f"story {i} " + "cat " * (9 * i)}] for i in range(12)]

    async def ask_all() -> list[str]:
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            answers = [
                client.chat.completions.create(
                    model="tiny",
                    messages=chat,
                    max_tokens=15,
                    temperature=1.0,
                    seed=i,
                    **NO_END,
                )
                for i, chat in enumerate(chats)
            ]
            return [a.choices[0].message.content for a in await asyncio.gather(*answers)]

    together = asyncio.run(ask_all())
    with openai_client(port) as client:
        for i, chat in enumerate(chats):
            alone = client.chat.completions.create(
                model="tiny",
                messages=chat,
                max_tokens=15,
                temperature=1.0,
                seed=i,
                **NO_END,
            )
            assert alone.choices[0].message.content == together[i]
    assert together[0] == chat_answer(model, chats[0], 15, seed=0)
    assert len(set(together)) > 6


def test_the_next_turn_of_a_chat_finds_the_last_in_its_slot(client: openai.OpenAI) -> None:
    chat = [{"role": "user", "content": "remember the number seven"}]
    first = client.chat.completions.create(model="t", messages=chat, max_tokens=8, **NO_END)
    chat += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "which one?"},
    ]
    second = client.chat.completions.create(model="t", messages=chat, max_tokens=2, **NO_END)
    details = second.usage.prompt_tokens_details
    assert details.cached_tokens >= first.usage.prompt_tokens - 1


def test_a_client_that_goes_away_frees_its_slot(lut: Path) -> None:
    """While its answer is streamed, while it waits for a whole one, and while it is queued."""
    body = {"prompt": "x", "max_tokens": 1400, **NO_END}
    with running(lut, "--parallel", "1") as (_, port), openai_client(port) as client:
        for n, stream in enumerate((True, False, True), start=1):
            streamed = {**body, "stream": stream}
            with unread(port, "/v1/completions", streamed):
                wait_for(lambda: metric(port, "requests_processing") == 1)
                with unread(port, "/v1/completions", streamed):
                    wait_for(lambda: metric(port, "requests_deferred") == 1)
                wait_for(lambda: metric(port, "requests_deferred") == 0)
                assert metric(port, "requests_processing") == 1, "it must not be done by itself"
            wait_for(lambda: metric(port, "requests_processing") == 0)
            assert metric(port, "requests_cancelled_total") == 2 * n
            assert metric(port, "requests_finished_total") == n - 1
            client.completions.create(model="t", prompt="x", max_tokens=2, **NO_END)


def test_a_client_that_goes_away_while_its_prompt_is_computed(model: Model) -> None:
    with stalled(model, timeout=60) as (engine, port):
        with unread(port, "/v1/completions", {"prompt": [5] * 1000}):
            wait_for(lambda: engine.n_waiting == 1)
            engine.step()
            [job] = [slot.job for slot in engine._slots]
            assert not job.cancelled
        wait_for(lambda: job.cancelled)
        assert not engine.step()
        assert (engine.n_active, engine.counters.prompt_tokens) == (0, 64)


def test_a_full_queue(model: Model) -> None:
    with stalled(model, timeout=60) as (engine, port), ThreadPoolExecutor(1) as pool:
        body = {"prompt": "x", "max_tokens": 2, **NO_END}
        waiting = pool.submit(send, port, "POST", "/v1/completions", body)
        wait_for(lambda: engine.n_waiting == 1)
        status, text = send(port, "POST", "/v1/completions", body)
        assert (status, json.loads(text)["error"]["type"]) == (429, "rate_limit_error")
        while engine.step():
            pass
        assert waiting.result(30)[0] == 200


def test_those_who_wait_are_told_apart_by_address_and_user(model: Model) -> None:
    reader = RequestReader(model)
    clients = [
        reader.completion({"prompt": "x", **user}, address).requests[0].client
        for address in ("10.0.0.1", "10.0.0.2")
        for user in ({}, {"user": "a"}, {"user": "b"}, {"user": "a"})
    ]
    assert len(set(clients)) == 6
    assert clients[1] == clients[3]
