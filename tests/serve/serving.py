"""``tmac serve`` as a process, and what tests of it share."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import uvicorn

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


@contextmanager
def unread(port: int, path: str, body: object) -> Iterator[None]:
    """A client that sends a request, reads no answer and goes away at the end."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
            "Content-Type: application/json\r\n\r\n".encode()
            + data
        )
        yield


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
