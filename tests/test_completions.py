"""Dicts as llama-cpp-python's: read by OpenAI's own types, with the texts that generate gives."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

import tiny_model as tiny
from tmac_py import Model, OptionError, TmacError
from tmac_py.sampling import top_logprobs

HELLO = [{"role": "user", "content": "the cat"}]
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"enum": ["cat", "mat"]}}},
    },
}
SEEDED = {"seed": 5, "temperature": 1.0, "max_tokens": 12, "logit_bias": {"2": -float("inf")}}
SAME = {**SEEDED, "logit_bias": {2: -float("inf")}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("completions") / "tiny.lut"
    tiny.write_tiny_model(
        path, max_position_embeddings=300, special=("embed",), quantize=tiny.flat_head
    )
    with Model.load(path, threads=1) as model:
        yield model


def test_a_completion(model: Model) -> None:
    answer = model.generate("the cat", **SAME)
    completion = model.create_completion("the cat", **SEEDED)
    assert set(completion) == {"id", "object", "created", "model", "choices", "usage"}
    assert completion["id"].startswith("cmpl-")
    assert (completion["object"], completion["model"]) == ("text_completion", "tiny")
    assert completion["choices"] == [
        {"index": 0, "text": answer, "logprobs": None, "finish_reason": "length"}
    ]
    counts = {key: completion["usage"][key] for key in ("prompt_tokens", "completion_tokens")}
    n_prompt = len(model.check_prompt("the cat"))
    assert counts == {"prompt_tokens": n_prompt, "completion_tokens": 12}
    assert completion["usage"]["total_tokens"] == n_prompt + 12
    Completion.model_validate_json(json.dumps(completion), strict=True)


def test_a_completion_in_chunks(model: Model) -> None:
    answer = model.generate("the cat", **SAME)
    chunks = list(
        model.create_completion(
            "the cat", stream=True, stream_options={"include_usage": True}, model="it", **SEEDED
        )
    )
    *texts, end, counts = chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in texts) == answer
    assert end["choices"][0]["finish_reason"] == "length"
    assert counts["usage"]["completion_tokens"] == 12
    assert {(chunk["id"], chunk["model"]) for chunk in chunks} == {(end["id"], "it")}
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    json.dumps(chunks, allow_nan=False)


def test_a_chat_completion(model: Model) -> None:
    answer = model.chat(HELLO, **SAME)
    completion = model.create_chat_completion(HELLO, **SEEDED)
    assert completion["object"] == "chat.completion"
    (choice,) = completion["choices"]
    assert choice["message"] == {"role": "assistant", "content": answer}
    assert (choice["index"], choice["finish_reason"]) == (0, "length")
    ChatCompletion.model_validate_json(json.dumps(completion), strict=True)
    chunks = list(model.create_chat_completion(HELLO, stream=True, **SEEDED))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == answer
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "length"]
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)


def test_messages_in_parts_and_calls_are_read(model: Model) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    plain, in_parts = (
        model.create_chat_completion(messages, **SEEDED)["choices"] for messages in (HELLO, parts)
    )
    assert plain == in_parts
    template = "{{ messages[0].tool_calls[0].function.arguments.x }} {{ tools is none }}"
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": "the cat"}'}}
    asked = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    with Model.load(model.path, threads=1, chat_template=template) as other:
        for choice, text in ((None, "the cat False"), ("none", "the cat True")):
            completion = other.create_chat_completion(
                asked, tools=[LOOK], tool_choice=choice, max_tokens=1
            )
            wanted = len(other.tokenizer.encode(text, add_special=False))
            assert completion["usage"]["prompt_tokens"] == wanted


@pytest.mark.parametrize("choice", ["required", {"function": {"name": "look"}}])
def test_tools_that_have_to_be_called(model: Model, choice: object) -> None:
    asked = {"tools": [LOOK], "tool_choice": choice, "seed": 1}
    completion = model.create_chat_completion(HELLO, **asked)
    (answer,) = completion["choices"]
    (call,) = answer["message"]["tool_calls"]
    assert answer["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "look"
    assert json.loads(call["function"]["arguments"]).get("at", "cat") in ("cat", "mat")
    ChatCompletion.model_validate_json(json.dumps(completion), strict=True)
    chunks = list(model.create_chat_completion(HELLO, stream=True, **asked))
    calls = [c for chunk in chunks for c in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [one["function"] for one in calls] == [call["function"]]


def test_parameters_with_definitions_of_their_own(model: Model) -> None:
    """As pydantic writes them: each tool's "#/$defs/Place" is its own."""
    tools = [
        {
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {"at": {"$ref": "#/$defs/Place"}},
                    "required": ["at"],
                    "additionalProperties": False,
                    "$defs": {"Place": {"enum": [place]}},
                },
            }
        }
        for name, place in (("look", "cat"), ("sit", "mat"))
    ]
    for name, place in (("look", "cat"), ("sit", "mat")):
        completion = model.create_chat_completion(
            HELLO, tools=tools, tool_choice={"function": {"name": name}}, seed=1
        )
        (call,) = completion["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == {"at": place}
    for seed in range(4):
        completion = model.create_chat_completion(
            HELLO, tools=tools, tool_choice="required", seed=seed
        )
        (call,) = completion["choices"][0]["message"]["tool_calls"]
        place = {"look": "cat", "sit": "mat"}[call["function"]["name"]]
        assert json.loads(call["function"]["arguments"]) == {"at": place}


def test_echo(model: Model) -> None:
    answer = model.generate("the cat", **SAME)
    for prompt in ("the cat", model.check_prompt("the cat").tolist()):
        completion = model.create_completion(prompt, echo=True, **SEEDED)
        assert completion["choices"][0]["text"] == "the cat" + answer
        chunks = model.create_completion(prompt, echo=True, stream=True, **SEEDED)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the cat" + answer


def test_logprobs(model: Model) -> None:
    prompt = model.check_prompt("the cat").tolist()
    completion = model.create_completion("the cat", logprobs=3, **SEEDED)
    found = completion["choices"][0]["logprobs"]
    answer = model.generate("the cat", **SAME)
    assert found["token_logprobs"] == list(answer.logprobs)
    assert len(found["tokens"]) == len(found["text_offset"]) == 12
    rows = model.logits([*prompt, *answer.ids])[len(prompt) - 1 : -1]
    for row, top in zip(rows, found["top_logprobs"], strict=True):
        wanted = [value for _, value in top_logprobs(row, 3)]
        for value in top.values():  # two tokens may have one text
            assert min(abs(value - one) for one in wanted) < 1e-3
    Completion.model_validate_json(json.dumps(completion), strict=True)
    chat = model.create_chat_completion(HELLO, logprobs=True, top_logprobs=2, **SEEDED)
    content = chat["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * 12
    ChatCompletion.model_validate_json(json.dumps(chat), strict=True)


def test_forms_and_limits(model: Model) -> None:
    wanted = {"type": "json_schema", "json_schema": {"schema": {"enum": ["low", "high"]}}}
    completion = model.create_chat_completion(HELLO, response_format=wanted, seed=-1)
    assert json.loads(completion["choices"][0]["message"]["content"]) in ("low", "high")
    assert completion["choices"][0]["finish_reason"] == "stop"
    full = model.create_completion([5, 6], max_tokens=0, logit_bias=SEEDED["logit_bias"])
    assert full["usage"]["total_tokens"] == model.n_ctx
    assert (
        model.create_completion([5, 6], logit_bias=SEEDED["logit_bias"])["usage"][
            "completion_tokens"
        ]
        == 256
    )


def test_what_is_wrong(model: Model) -> None:
    for call, text in (
        (lambda: model.create_completion("a", logprobs=21), "logprobs is 21; allowed: 0 to 20"),
        (lambda: model.create_completion("a", logprobs=False), "logprobs is False; allowed: 0"),
        (lambda: model.create_completion(["a"], echo=True), "token ids must be a sequence"),
        (lambda: model.create_completion("a", stream_options=5), "stream_options is 5; allowed"),
        (lambda: model.create_completion("a", max_tokens="9"), "max_tokens is '9'; allowed: 1 up"),
        (lambda: model.generate("a", max_tokens="9"), "max_tokens is '9'; allowed: 1 up"),
        (lambda: model.create_chat_completion([]), "messages is missing or empty"),
        (lambda: model.create_chat_completion(HELLO, tool_choice="x"), "tool_choice: allowed"),
        (lambda: model.create_chat_completion(HELLO, tool_choice="required"), "no such tool"),
        (lambda: model.create_chat_completion(HELLO, tools=[{}]), "has no function with a name"),
        (lambda: model.create_completion("a", echo=True, logprobs=1), "echo and logprobs"),
        (lambda: model.create_chat_completion(HELLO, top_logprobs=1), "needs logprobs=True"),
        (lambda: model.create_completion("a", logit_bias={"x": 1}), "token id of logit_bias"),
        (
            lambda: model.create_completion(
                "a", response_format={"type": "json_object"}, regex="a"
            ),
            "response_format, tool_choice, json_schema",
        ),
    ):
        with pytest.raises(OptionError, match=text):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'mirostat_mode'"):
        model.create_completion("a", mirostat_mode=2)


def test_a_cancelled_completion_is_none(model: Model) -> None:
    class Always:
        def is_set(self) -> bool:
            return True

    with pytest.raises(TmacError, match="the completion was cancelled"):
        model.create_completion("the cat", cancel=Always())
    assert list(model.create_completion("the cat", cancel=Always(), stream=True)) == []
