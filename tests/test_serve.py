"""``tmac serve`` as a process, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import uvicorn

import tiny_model as tiny
from tmac_py.cli.main import serve as tmac_serve
from tmac_py.model import Model
from tmac_py.server.app import ServerOptions, make_app
from tmac_py.server.engine import Engine
from tmac_py.server.run import bind

N_CTX = 1500
SEEDED = {"seed": 5, "temperature": 1.0}
NO_END = {"logit_bias": {"2": -100}}
HELLO = [{"role": "user", "content": "the cat"}]


@contextmanager
def running(lut: Path, *options: str, **environment: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server at a port of its own; gives the process and the port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tmac_py", "serve", str(lut), "--port", "0", "-t", "1", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+:(\d+)", line)
        assert found is not None, line + process.stderr.read()
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def lut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve") / "tiny.lut"
    return tiny.write_tiny_model(
        path, max_position_embeddings=N_CTX, special=("embed",), quantize=tiny.flat_head
    )


@pytest.fixture(scope="module")
def port(lut: Path) -> Iterator[int]:
    with running(lut, "--alias", "tiny") as (_, port):
        yield port


@pytest.fixture(scope="module")
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai_client(port) as client:
        yield client


@pytest.fixture(scope="module")
def model(lut: Path) -> Iterator[Model]:
    with Model.load(lut, threads=1) as model:
        yield model


def openai_client(port: int, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)


def send(
    port: int, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    kind = {"Content-Type": "application/json"} if data is not None else {}
    connection.request(method, path, data, {**kind, **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def metric(port: int, name: str) -> float:
    text = send(port, "GET", "/metrics")[1]
    found = re.search(rf"^tmac:{name} (\S+)$", text, re.M)
    assert found is not None, text
    return float(found[1])


def wait_for(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


def chat_answer(model: Model, messages: list[dict[str, str]], n: int, **options) -> str:
    return str(
        model.generate(
            model.chat_prompt(messages),
            max_tokens=n,
            logit_bias={2: -float("inf")},
            trim_space=True,
            **{**SEEDED, **options},
        )
    )


def test_chat(client: openai.OpenAI, model: Model) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=20,
        **SEEDED,
        **NO_END,
        logprobs=True,
        top_logprobs=3,
    )
    expected = model.generate(
        model.chat_prompt(HELLO), max_tokens=20, logit_bias={2: -float("inf")}, **SEEDED
    )
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", str(expected))
    assert choice.finish_reason == "length"
    assert answer.model == "tiny"
    assert answer.usage.prompt_tokens == len(model.chat_prompt(HELLO))
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 20
    entries = choice.logprobs.content
    assert [entry.logprob for entry in entries] == pytest.approx(list(expected.logprobs))
    assert [len(entry.top_logprobs) for entry in entries] == [3] * 20
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == expected


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


def test_completions(client: openai.OpenAI, model: Model) -> None:
    options = {**SEEDED, **NO_END, "max_tokens": 12}
    expected = model.generate("the cat", max_tokens=12, logit_bias={2: -float("inf")}, **SEEDED)
    for prompt in ("the cat", model.tokenizer.encode("the cat"), ["the cat"]):
        answer = client.completions.create(model="tiny", prompt=prompt, **options, logprobs=2)
        assert answer.choices[0].text == str(expected)
    logprobs = answer.choices[0].logprobs
    assert logprobs.token_logprobs == pytest.approx(list(expected.logprobs))
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == len(logprobs.text_offset) == 12
    stream = client.completions.create(model="tiny", prompt="the cat", stream=True, **options)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == str(expected)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stop_strings(client: openai.OpenAI, model: Model) -> None:
    text = chat_answer(model, HELLO, 40)
    stop = text[8:11]
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=40, stop=[stop, "never"], **SEEDED, **NO_END
    )
    assert answer.choices[0].message.content == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


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
            data = json.dumps({**body, "stream": stream}).encode()
            request = (
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
                b"Content-Type: application/json\r\n\r\n" % len(data)
            )
            with socket.create_connection(("127.0.0.1", port)) as gone:
                gone.sendall(request + data)
                wait_for(lambda: metric(port, "requests_processing") == 1)
                with socket.create_connection(("127.0.0.1", port)) as queued:
                    queued.sendall(request + data)
                    wait_for(lambda: metric(port, "requests_deferred") == 1)
                wait_for(lambda: metric(port, "requests_deferred") == 0)
                assert metric(port, "requests_processing") == 1, "it must not be done by itself"
            wait_for(lambda: metric(port, "requests_processing") == 0)
            assert metric(port, "requests_cancelled_total") == 2 * n
            assert metric(port, "requests_finished_total") == n - 1
            client.completions.create(model="t", prompt="x", max_tokens=2, **NO_END)


def test_structured_output(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "tag": {"enum": ["x", "y"]},
            "n": {"type": "integer", "minimum": 10, "maximum": 99},
        },
        "required": ["name", "tag", "n"],
        "additionalProperties": False,
    }
    for seed in range(4):
        answer = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=600,
            seed=seed,
            temperature=1.5,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        )
        assert answer.choices[0].finish_reason == "stop"
        found = json.loads(answer.choices[0].message.content)
        assert set(found) == {"name", "tag", "n"}
        assert found["tag"] in ("x", "y")
        assert 10 <= found["n"] <= 99
        assert len(found["name"]) <= 5
    free = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=5, response_format={"type": "text"}
    )
    assert free.usage.completion_tokens <= 5


def test_tools_go_through_the_template(tmp_path: Path) -> None:
    template = (
        "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.arguments.city }}){% endfor %}"
        "{% endfor %}{{ '!' if loud else '' }}"
    )
    path = tiny.write_tiny_model(tmp_path / "tools.lut", chat=False, files=tool_files(template))
    body = {
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "type": "function",
                        "id": "1",
                        "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
                    }
                ],
            },
        ],
        "chat_template_kwargs": {"loud": True},
    }
    with running(path) as (_, port):
        status, text = send(port, "POST", "/apply-template", body)
        assert (status, json.loads(text)["prompt"]) == (200, "[weather]<user>ab<assistant>(Bern)!")
        text = send(port, "POST", "/apply-template", {**body, "tool_choice": "none"})[1]
        assert json.loads(text)["prompt"].startswith("<user>")
        status, text = send(
            port, "POST", "/v1/chat/completions", {**body, "tool_choice": "required"}
        )
        assert (status, "tool_choice" in text) == (400, True)


def tool_files(template: str) -> dict[str, bytes]:
    from tiny_vocab import byte_level_json

    settings = {"add_bos_token": False, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return {
        "tokenizer.json": byte_level_json(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "chat_template.jinja": template.encode(),
    }


def test_tokens_and_text(port: int, model: Model) -> None:
    text = "<|im_start|>the cat"
    tokens = json.loads(send(port, "POST", "/tokenize", {"content": text})[1])["tokens"]
    assert tokens == model.tokenizer.encode(text, add_special=False)
    plain = send(port, "POST", "/tokenize", {"content": text, "parse_special": False})[1]
    assert len(json.loads(plain)["tokens"]) > len(tokens)
    back = json.loads(send(port, "POST", "/detokenize", {"tokens": tokens})[1])
    assert back["content"].endswith("the cat")
    assert json.loads(send(port, "POST", "/detokenize", {"tokens": []})[1])["content"] == ""


def test_models_health_and_metrics(client: openai.OpenAI, port: int) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
        client.models.retrieve("gpt")
    assert send(port, "GET", "/health") == (200, '{"status":"ok"}')
    before = metric(port, "prompt_tokens_total"), metric(port, "tokens_predicted_total")
    client.completions.create(
        model="t", prompt="a new prompt", max_tokens=6, **NO_END, extra_body={"cache_prompt": False}
    )
    assert metric(port, "tokens_predicted_total") == before[1] + 5
    assert metric(port, "prompt_tokens_total") > before[0]
    text = send(port, "GET", "/metrics")[1]
    names = re.findall(r"^# TYPE (\S+) (?:counter|gauge)$", text, re.M)
    assert names == re.findall(r"^(tmac:\w+) [\d.e+-]+$", text, re.M)


def test_the_page_is_served_and_needs_nothing_else(port: int) -> None:
    status, page = send(port, "GET", "/")
    assert status == 200
    assert "<title>" in page
    assert not re.findall(r"""(?:src|href|action)\s*=\s*["'](?!data:)""", page)
    assert not re.findall(r"https?://|@import|url\(", page)
    for path in set(re.findall(r'fetch\("([^"]+)"', page)):
        assert send(port, "GET", f"/{path}")[0] in (200, 405), path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"n": 2}, "n is not supported; allowed: 1"),
        ({"messages": []}, "messages is missing or empty"),
        ({"messages": "hi"}, "messages is 'hi'; allowed: a list of objects"),
        ({"messages": [{"content": "x"}]}, "messages[0] has no role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: only parts of type 'text'",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
        ({"messages": [{"role": "user", "content": "x " * 1600}]}, "the context holds 1500"),
        ({"temperature": -1}, "temperature is -1; allowed: 0 to 100"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0; allowed: 1 up"),
        ({"max_tokens": True}, "max_tokens is True"),
        ({"stop": [""]}, "stop is ''"),
        ({"stop": 5}, "stop: allowed: a text, or a list of up to 16"),
        ({"stop": ["x"] * 17}, "a list of up to 16"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"stream": "yes"}, "stream is 'yes'; allowed: true, false"),
        ({"logit_bias": {"a": 1}}, "'a' is no token id"),
        ({"logit_bias": {"99999": 1}}, "a token id of logit_bias is 99999"),
        ({"logit_bias": {"5": 101}}, "logit_bias is 101; allowed: -100 to 100"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; allowed: 0 to 20"),
        ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        ({"response_format": "json"}, "response_format: allowed: an object"),
        ({"response_format": {"type": "json_schema"}}, "json_schema without a schema"),
        (
            {"response_format": {"type": "json_object", "schema": {"type": "strange"}}},
            "this schema is not supported",
        ),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
        ({"chat_template_kwargs": {"messages": []}}, "messages has a field of its own"),
    ],
)
def test_a_request_that_is_wrong_is_one_line(port: int, change: dict, text: str) -> None:
    body = {"messages": HELLO, "max_tokens": 3, **change}
    status, answer = send(port, "POST", "/v1/chat/completions", body)
    error = json.loads(answer)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error")
    assert text in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "text"),
    [
        ("POST", "/v1/completions", {"max_tokens": 1}, {}, 400, "prompt: allowed: one text"),
        ("POST", "/v1/completions", {"prompt": ["a", "b"]}, {}, 400, "prompt: allowed"),
        ("POST", "/v1/completions", {"prompt": ""}, {}, 400, "the prompt is empty"),
        ("POST", "/v1/completions", {"prompt": [99999]}, {}, 400, "outside the vocabulary"),
        ("POST", "/v1/completions", {"prompt": "x", "echo": True}, {}, 400, "echo is not supp"),
        ("POST", "/v1/completions", b"{", {}, 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"[" * 100000, {}, 400, "the body is not JSON"),
        ("POST", "/v1/completions", [1], {}, 400, "not a JSON object"),
        ("POST", "/v1/completions", {}, {"Content-Type": "text/plain"}, 415, "application/json"),
        ("POST", "/v1/embeddings", {"input": "x"}, {}, 501, "embeddings are not supported"),
        ("GET", "/v1/completions", None, {}, 405, "Method Not Allowed"),
        ("GET", "/v2", None, {}, 404, "Not Found"),
        ("POST", "/tokenize", {"content": 5}, {}, 400, "content: allowed: a text"),
        ("POST", "/detokenize", {"tokens": [99999]}, {}, 400, "outside the vocabulary"),
    ],
)
def test_other_errors(
    port: int, method: str, path: str, body: object, headers: dict, status: int, text: str
) -> None:
    found, answer = send(port, method, path, body, headers)
    assert found == status
    assert text in json.loads(answer)["error"]["message"]


def test_pages_that_go_by_another_name_are_refused(port: int) -> None:
    assert send(port, "GET", "/health", headers={"Host": "evil.example"})[0] == 400


def test_keys_limits_and_origins(lut: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("from-file\n\n")
    options = ("--api-key", "one", "--api-key-file", str(keys), "--max-body", "300")
    more = ("--cors-origin", "https://a.example", "--max-tokens", "4", "--max-queue", "0")
    environment = {"TMAC_API_KEY": "from-environment"}
    with running(lut, *options, *more, "--parallel", "1", **environment) as (_, port):
        with openai_client(port, "wrong") as client:
            with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
                client.models.list()
            for key in ("one", "from-file", "from-environment"):
                assert client.with_options(api_key=key).models.list().data
        assert send(port, "GET", "/metrics")[0] == 401
        assert send(port, "GET", "/health")[0] == 200
        assert send(port, "GET", "/")[0] == 200
        with openai_client(port, "one") as client:
            for wanted in ({}, {"max_tokens": 100}):
                answer = client.completions.create(model="t", prompt="x", **NO_END, **wanted)
                assert answer.usage.completion_tokens == 4
            with pytest.raises(openai.APIStatusError) as caught:
                client.completions.create(model="t", prompt="x" * 300)
            assert caught.value.status_code == 413
        asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
        assert send(port, "OPTIONS", "/v1/completions", headers=asked)[0] == 200
        asked["Origin"] = "https://b.example"
        assert send(port, "OPTIONS", "/v1/completions", headers=asked)[0] == 400


@contextmanager
def stalled(model: Model, timeout: float) -> Iterator[tuple[Engine, int]]:
    """A server in this process whose engine computes nothing, with one slot and no queue."""
    engine = Engine(model, parallel=1, max_queue=0)
    app = make_app(engine, ServerOptions(name="stalled", timeout=timeout))
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield engine, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(model: Model, stream: bool) -> None:
    with stalled(model, timeout=0.3) as (engine, port):
        status, text = send(port, "POST", "/v1/completions", {"prompt": "x", "stream": stream})
        assert (status, json.loads(text)["error"]["code"]) == (504, "timeout")
        assert engine.n_waiting == 0


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


def test_a_client_that_goes_away_while_its_prompt_is_computed(model: Model) -> None:
    with stalled(model, timeout=60) as (engine, port):
        data = json.dumps({"prompt": [5] * 1000}).encode()
        with socket.create_connection(("127.0.0.1", port)) as gone:
            gone.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n"
                b"Content-Type: application/json\r\n\r\n%b" % (len(data), data)
            )
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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--port", "70000"], "--port: allowed: 0 to 65535"),
        (["--parallel", "0"], "parallel is 0; allowed: 1 to 256"),
        (["--ctx-size", "9999"], "n_ctx is 9999; allowed: 0 to 1500"),
        (["--kv", "f8"], "kv is 'f8'"),
        (["--max-tokens", "0"], "--max-tokens: allowed: 1 up, or -1"),
        (["--timeout", "nan"], "--timeout: allowed: above 0"),
        (["--api-key", ""], "an API key is empty"),
        (["--api-key-file", "missing"], "missing: No such file"),
        (["--host", "no such host"], "no such host: "),
        (["--threads", "0"], "threads is 0"),
    ],
)
def test_options_that_are_wrong_are_one_line(
    lut: Path, capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert tmac_serve([str(lut), "--port", "0", *options]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    err = capsys.readouterr().err
    assert err.startswith("tmac-serve: error: ")
    assert len(err.splitlines()) == 1
    assert text in err


def test_a_port_in_use_is_one_line(lut: Path, port: int) -> None:
    command = [sys.executable, "-m", "tmac_py", "serve", str(lut), "--port", str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"tmac serve: error: 127.0.0.1:{port}: Address already in use; choose another --port\n"
    )
