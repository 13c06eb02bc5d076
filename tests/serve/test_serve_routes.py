"""The routes of ``tmac serve`` and what their fields do, with OpenAI's own client."""

from __future__ import annotations

import json
import re

import numpy as np
import openai
import pytest

from serving import HELLO, NO_END, SEEDED, chat_answer, metric, send
from tmac_py.model import Model


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
        ({"n": 0}, "n is 0; allowed: 1 to 128"),
        ({"n": 129}, "n is 129; allowed: 1 to 128"),
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
        ({"chat_template_kwargs": {"messages": []}}, "'messages' is not a variable to choose"),
        ({"temperature": 10**400}, "allowed: 0 to 100"),
        ({"logit_bias": {"5": 10**400}}, "allowed: -100 to 100"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"arguments": "[" * 9999}}]}
                ]
            },
            "arguments are not JSON",
        ),
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
        ("POST", "/v1/completions", {"max_tokens": 1}, {}, 400, "prompt: allowed: a text"),
        ("POST", "/v1/completions", {"prompt": ["a", 5]}, {}, 400, "prompt: allowed"),
        ("POST", "/v1/completions", {"prompt": ["a", ""]}, {}, 400, "the prompt is empty"),
        ("POST", "/v1/completions", {"prompt": ["a"] * 65, "n": 2}, {}, 400, "130 answers in one"),
        ("POST", "/v1/completions", {"prompt": ""}, {}, 400, "the prompt is empty"),
        ("POST", "/v1/completions", {"prompt": [99999]}, {}, 400, "outside the vocabulary"),
        (
            "POST",
            "/v1/completions",
            {"prompt": "x", "echo": 1},
            {},
            400,
            "echo is 1; allowed: true",
        ),
        ("POST", "/v1/completions", {"prompt": "x", "suffix": "y"}, {}, 400, "suffix is not supp"),
        ("POST", "/v1/completions", {"prompt": "x", "n": 3, "best_of": 2}, {}, 400, "best_of is 2"),
        (
            "POST",
            "/v1/completions",
            {"prompt": "x", "best_of": 2, "stream": True},
            {},
            400,
            "best_of above n cannot be streamed",
        ),
        ("POST", "/v1/completions", b"{", {}, 400, "the body is not JSON"),
        ("POST", "/v1/completions", b"[" * 100000, {}, 400, "the body is not JSON"),
        ("POST", "/v1/completions", [1], {}, 400, "not a JSON object"),
        ("POST", "/v1/completions", {}, {"Content-Type": "text/plain"}, 415, "application/json"),
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


def test_several_answers(client: openai.OpenAI, model: Model) -> None:
    """The i-th is that of the seed plus i; equal seeds give equal answers."""
    wanted = [chat_answer(model, HELLO, 12, seed=5 + i) for i in range(3)]
    options = {"model": "t", "messages": HELLO, "max_tokens": 12, "n": 3, **SEEDED, **NO_END}
    answer = client.chat.completions.create(**options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == wanted
    assert answer.usage.completion_tokens == 36
    assert answer.usage.prompt_tokens == len(model.chat_prompt(HELLO))
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == wanted
    reasons = [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason]
    assert reasons == ["length"] * 3
    assert chunks[-1].usage.completion_tokens == 36


def test_several_prompts_and_the_best_of_several_answers(
    client: openai.OpenAI, model: Model
) -> None:
    options = {"max_tokens": 9, **SEEDED}
    bias = {2: -float("inf")}
    prompts = ["the cat", model.tokenizer.encode("a story")]
    candidates = [
        [model.generate(prompt, **{**options, "seed": 5 + i}, logit_bias=bias) for i in range(4)]
        for prompt in ("the cat", "a story")
    ]
    answer = client.completions.create(model="t", prompt=prompts, n=2, **options, **NO_END)
    assert [c.text for c in answer.choices] == [str(r) for row in candidates for r in row[:2]]
    best = client.completions.create(model="t", prompt=prompts, best_of=4, **options, **NO_END)
    for choice, row in zip(best.choices, candidates, strict=True):
        assert choice.text == str(max(row, key=lambda result: sum(result.logprobs)))
    assert best.usage.completion_tokens == 2 * 4 * 9
    n_prompt = sum(len(model.tokenizer.encode(text)) for text in ("the cat", "a story"))
    assert best.usage.prompt_tokens == n_prompt


def test_echo(client: openai.OpenAI, model: Model) -> None:
    """With log probabilities those of the prompt come too, as programs that score texts want."""
    ids = model.tokenizer.encode("the cat sat")
    expected = model.generate(ids, max_tokens=4, temperature=0, logit_bias={2: -float("inf")})
    options = {"model": "t", "max_tokens": 4, "temperature": 0, "echo": True, **NO_END}
    for prompt in ("the cat sat", ids):
        plain = client.completions.create(prompt=prompt, **options)
        assert plain.choices[0].text == "the cat sat" + expected
        assert plain.usage.completion_tokens == 4
        scored = client.completions.create(prompt=prompt, logprobs=1, **options)
        for stream in (False, True):
            chunks = client.completions.create(
                prompt=prompt, stream=True, logprobs=1 if stream else None, **options
            )
            assert "".join(c.choices[0].text for c in chunks) == plain.choices[0].text
        [choice] = scored.choices
        assert choice.text == plain.choices[0].text
        found = choice.logprobs
        assert len(found.tokens) == len(ids) + 4
        assert found.text_offset[0] == 0
        for at, token in zip(found.text_offset, found.tokens, strict=True):
            assert choice.text[at:].startswith(token)
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        logits = model.logits(ids).astype(np.float64)
        scores = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        want = scores[np.arange(len(ids) - 1), ids[1:]].tolist()
        assert found.token_logprobs[1 : len(ids)] == pytest.approx(want, abs=1e-4)
        assert found.token_logprobs[len(ids) :] == pytest.approx(list(expected.logprobs))
        for row, top in zip(scores, found.top_logprobs[1 : len(ids)], strict=False):
            assert list(top.values()) == pytest.approx([row.max()], abs=1e-4)
