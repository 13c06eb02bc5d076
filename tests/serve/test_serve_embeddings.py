"""Embeddings over HTTP, with OpenAI's own client."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import openai
import pytest

from serving import metric, openai_client, running, send, stalled, unread, wait_for
from tmac_py.model import Model

TEXTS = ["the cat", "a story of rain " * 9, "x"]


def test_embeddings(client: openai.OpenAI, model: Model, port: int) -> None:
    expected = model.embed(TEXTS)
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    for texts in (TEXTS, ids):
        # The client asks for base64 where no format is named.
        for form in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            answer = client.embeddings.create(model="t", input=texts, **form)
            rows = [row.embedding for row in answer.data]
            if form.get("encoding_format") == "base64":
                rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
            np.testing.assert_array_equal(np.array(rows, np.float32), expected)
        assert [row.index for row in answer.data] == [0, 1, 2]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
        assert answer.model == "tiny"
    for one in (TEXTS[0], ids[0]):
        [row] = client.embeddings.create(model="t", input=one, dimensions=64).data
        np.testing.assert_array_equal(np.array(row.embedding, np.float32), expected[0])
    before = metric(port, "prompt_tokens_total")
    client.embeddings.create(model="t", input=ids)
    assert metric(port, "prompt_tokens_total") - before == sum(map(len, ids))


@pytest.mark.parametrize("pooling", ["last", "cls"])
def test_pooling_is_an_option_of_the_server(lut: Path, model: Model, pooling: str) -> None:
    with running(lut, "--pooling", pooling) as (_, port), openai_client(port) as client:
        [row] = client.embeddings.create(model="t", input="the cat").data
    [expected] = model.embed("the cat", pooling=pooling)
    np.testing.assert_array_equal(np.array(row.embedding, np.float32), expected)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "input is missing; allowed: a text, token ids, or a list of these"),
        ({"input": []}, "input: there is no text to embed"),
        ({"input": ""}, "input: the prompt has no tokens"),
        ({"input": ["a", ""]}, "input: the prompt has no tokens"),
        ({"input": {"a": 1}}, "input: texts to embed: allowed"),
        ({"input": ["a", 5]}, "input: "),
        ({"input": [[5], None]}, "input: "),
        ({"input": [99999]}, "input: token id 99999 is outside the vocabulary"),
        ({"input": ["a"] * 2049}, "input has 2049 texts; allowed: up to 2048"),
        ({"input": "x " * 1600}, "the context holds 1500"),
        ({"input": "x", "dimensions": 5}, "dimensions is not supported; allowed: 64"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format is 'int8'; allowed: 'float'"),
    ],
)
def test_what_cannot_be_embedded_is_one_line(port: int, body: dict, text: str) -> None:
    status, answer = send(port, "POST", "/v1/embeddings", body)
    message = json.loads(answer)["error"]["message"]
    assert (status, text in message, "\n" in message) == (400, True, False), message


def test_a_client_that_goes_away_gets_no_embedding(model: Model) -> None:
    with stalled(model, timeout=60) as (engine, port):
        with unread(port, "/v1/embeddings", {"input": [5] * 1000}):
            wait_for(lambda: engine.n_waiting == 1)
            engine.step()
            assert engine.n_waiting == 1
        wait_for(lambda: engine.n_waiting == 0)
        assert (engine.counters.cancelled, engine.counters.prompt_tokens) == (1, 64)


def test_embeddings_that_take_too_long(model: Model) -> None:
    with stalled(model, timeout=0.3) as (engine, port):
        status, text = send(port, "POST", "/v1/embeddings", {"input": "x"})
        assert (status, json.loads(text)["error"]["code"]) == (504, "timeout")
        assert engine.n_waiting == 0
