"""Answers as events, and what ends them."""

from __future__ import annotations

import http.client
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from serving import HELLO, NO_END, SEEDED, chat_answer, metric, running, send, stalled, wait_for
from tmac_py.model import Model


def test_streamed_chat(client: openai.OpenAI, model: Model) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_completion_tokens=20,
        **SEEDED,
        **NO_END,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == chat_answer(model, HELLO, 20)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].usage.completion_tokens == 20
    assert len({chunk.id for chunk in chunks}) == 1


def test_time_that_runs_out_on_the_way_ends_the_stream_with_an_error(model: Model) -> None:
    with stalled(model, timeout=1) as (engine, port), ThreadPoolExecutor(1) as pool:
        body = {"prompt": "x", "stream": True, **NO_END}
        answer = pool.submit(send, port, "POST", "/v1/completions", body)
        wait_for(lambda: engine.n_waiting == 1)
        engine.step()
        engine.step()
        status, text = answer.result(30)
        assert status == 200
        *_, last, done, _ = text.split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert done == "data: [DONE]"
        assert engine.counters.decode_tokens == 1
        engine.step()
        assert engine.n_active == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_told_to_end_it_finishes_what_is_under_way(lut: Path, number: int, status: int) -> None:
    body = {"prompt": "x", "max_tokens": 300, "stream": True, **NO_END}
    with running(lut, "--grace", "60") as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        response.readline()
        process.send_signal(number)
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        assert process.wait(60) == status
        assert process.stderr is not None
        assert process.stderr.read() == ""


@pytest.mark.parametrize("stream", [False, True])
def test_told_to_end_at_once_it_says_so(lut: Path, stream: bool) -> None:
    body = {"prompt": "x", "max_tokens": 1400, "stream": stream, **NO_END}
    with running(lut, "--grace", "0") as (process, port), ThreadPoolExecutor(1) as pool:
        answer = pool.submit(send, port, "POST", "/v1/completions", body)
        wait_for(lambda: metric(port, "requests_processing") == 1)
        process.send_signal(signal.SIGTERM)
        status, text = answer.result(30)
        assert status == (200 if stream else 503)
        assert "the server is shutting down" in text
        assert process.wait(60) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
