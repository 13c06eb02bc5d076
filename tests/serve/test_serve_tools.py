"""Tools: through the template, and calls in answers."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCallFunction

import tiny_model as tiny
from serving import HELLO, running, send
from tmac_py.generate import Step, Timings, Token
from tmac_py.model import Model
from tmac_py.openai_replies import Reply, ReplyShape


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


def tool_files(template: str) -> dict[str, bytes]:
    from tiny_vocab import byte_level_json

    settings = {"add_bos_token": False, "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    return {
        "tokenizer.json": byte_level_json(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "chat_template.jinja": template.encode(),
    }


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Bern", "Rome"]}, "days": {"enum": [1, 2]}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}
ONLY_WEATHER = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", ONLY_WEATHER])
def test_an_answer_that_has_to_be_a_call(client: openai.OpenAI, choice: object) -> None:
    for seed in range(3):
        options = {
            "model": "t",
            "messages": HELLO,
            "tools": [WEATHER],
            "tool_choice": choice,
            "max_tokens": 300,
            "temperature": 1.5,
            "seed": seed,
        }
        [answer] = client.chat.completions.create(**options).choices
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        [call] = answer.message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        assert call.id.startswith("call_")
        found = json.loads(call.function.arguments)
        assert found["city"] in ("Bern", "Rome")
        assert found["days"] in (1, 2)
        chunks = [c.choices[0] for c in client.chat.completions.create(**options, stream=True)]
        assert not any(chunk.delta.content for chunk in chunks)
        [delta] = [one for chunk in chunks for one in chunk.delta.tool_calls or []]
        assert (delta.index, delta.function) == (
            0,
            ChoiceDeltaToolCallFunction(**vars(call.function)),
        )
        assert chunks[-1].finish_reason == "tool_calls"


def test_calls_among_text(model: Model) -> None:
    """Of an answer that is written here, shaped as the server does it, whole and in chunks."""
    text = 'I see. <tool_call>{"name": "time"}</tool_call>\n<tool_call>{"name": "weather"'
    text += ', "arguments": {"city": "Bern"}}</tool_call>'
    ids = model.tokenizer.encode(text, add_special=False)
    texts = [model.tokenizer.token_bytes(i).decode() for i in ids]
    steps = [
        Step(Token(piece, i, -1.0, None, Timings(n_prompt=5, n_gen=n)))
        for n, (piece, i) in enumerate(zip(texts, ids, strict=True), start=1)
    ]
    steps.append(Step(Token("", 2, -1.0, "stop", Timings(n_prompt=5, n_gen=len(ids) + 1))))
    shape = ReplyShape(chat=True, logprobs=True, tools=frozenset({"time", "weather"}))
    [choice] = Reply(shape, model.tokenizer, "m").whole(steps)["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == "I see."
    calls = [call["function"] for call in message["tool_calls"]]
    expected = [
        {"name": "time", "arguments": "{}"},
        {"name": "weather", "arguments": '{"city": "Bern"}'},
    ]
    assert calls == expected
    reply = Reply(shape, model.tokenizer, "m")
    choices = [c["choices"][0] for step in steps for c in reply.chunks(step)]
    assert "".join(c["delta"].get("content", "") for c in choices) == "I see."
    deltas = [call for c in choices for call in c["delta"].get("tool_calls", [])]
    assert [call["index"] for call in deltas] == [0, 1]
    assert [call["function"] for call in deltas] == expected
    assert len({call["id"] for call in deltas}) == 2
    assert choices[-1]["finish_reason"] == "tool_calls"
    entries = [e for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
    assert len(entries) == len(steps), "every token has its log probability once"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"tools": [{}]}, "tools[0] has no function with a name"),
        ({"tools": [{"function": {"name": "f", "parameters": 5}}]}, "parameters: allowed: an ob"),
        ({"tool_choice": "always"}, "tool_choice: allowed: 'auto', 'none', 'required', or a func"),
        ({"tool_choice": "required"}, "tool_choice: there is no such tool"),
        (
            {"tools": [TIME], "tool_choice": ONLY_WEATHER},
            "tool_choice: there is no such tool",
        ),
        (
            {
                "tools": [{"function": {"name": "f", "parameters": {"type": "strange"}}}],
                "tool_choice": "required",
            },
            "tool_choice: this schema is not supported",
        ),
    ],
)
def test_tools_that_are_wrong_are_one_line(port: int, change: dict, text: str) -> None:
    body = {"messages": HELLO, "max_tokens": 3, **change}
    status, answer = send(port, "POST", "/v1/chat/completions", body)
    assert (status, text in answer) == (400, True), answer
