"""Keys, limits and options of ``tmac serve``."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from serving import NO_END, openai_client, running, send, stalled
from tmac_py.cli.main import serve as tmac_serve
from tmac_py.cli.serve import add_arguments
from tmac_py.model import Model
from tmac_py.server.run import is_loopback


def test_it_listens_to_this_machine_only_unless_told_otherwise() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert is_loopback(parser.parse_args([]).host)
    assert not is_loopback("0.0.0.0")


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


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(model: Model, stream: bool) -> None:
    with stalled(model, timeout=0.3) as (engine, port):
        status, text = send(port, "POST", "/v1/completions", {"prompt": "x", "stream": stream})
        assert (status, json.loads(text)["error"]["code"]) == (504, "timeout")
        assert engine.n_waiting == 0


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
