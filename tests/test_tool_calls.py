"""Tool calls in answers, whole and as they come."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tmac_py.tool_calls import ToolCall, ToolCallFinder, call_schema

NAMES = frozenset({"weather", "time"})
CALL = '{"name": "weather", "arguments": {"city": "Zürich", "days": 2}}'
FOUND = ToolCall("weather", '{"city": "Zürich", "days": 2}')
TIME = ToolCall("time", "{}")


def joined(parts: list[str | ToolCall]) -> list[str | ToolCall]:
    """Texts that follow each other as one."""
    out: list[str | ToolCall] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        else:
            out.append(part)
    return out


def divide(text: str, sizes: list[int] | None = None) -> list[str | ToolCall]:
    finder, parts, at = ToolCallFinder(NAMES), [], 0
    for size in sizes or [len(text)]:
        parts += finder.push(text[at : at + size])
        at += size
    parts += finder.push(text[at:])
    return joined(parts + finder.flush())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain text, no call", ["plain text, no call"]),
        ("", []),
        ("   ", ["   "]),
        (f"<tool_call>\n{CALL}\n</tool_call>", [FOUND]),
        (f"Let me see.\n<tool_call>{CALL}</tool_call>\n", ["Let me see.", FOUND]),
        (
            f'<tool_call>{CALL}</tool_call>\n<tool_call>{{"name": "time"}}</tool_call>',
            [FOUND, TIME],
        ),
        (f"<tool_call>{CALL}</tool_call> and more", [FOUND, " and more"]),
        (f"<tool_call>{CALL}", [FOUND]),
        (f"<tool_call>{CALL[:-5]}", [f"<tool_call>{CALL[:-5]}"]),
        ("<tool_call>no JSON</tool_call>", ["<tool_call>no JSON</tool_call>"]),
        ('<tool_call>{"name": 5}</tool_call>', ['<tool_call>{"name": 5}</tool_call>']),
        ('<tool_call>{"name": "f", "arguments": NaN}</tool_call>', None),
        ("a <tool_cal", ["a <tool_cal"]),
        ("if a < b: <tool>", ["if a < b: <tool>"]),
        ('{"name": "time", "parameters": {}}', [TIME]),
        ('\n {"name": "time", "parameters": {}} ', [TIME]),
        (f'{{"name": "time", "parameters": {{}}}}; {CALL}', [TIME, FOUND]),
        (f"[{CALL}]", [FOUND]),
        (
            '[{"name": "time", "arguments": "{}"}, {"name": "time", "arguments": {}}]',
            [TIME, TIME],
        ),
        ('{"name": "unknown", "parameters": {}}', ['{"name": "unknown", "parameters": {}}']),
        ('{"name": "time", "parameters": []}', ['{"name": "time", "parameters": []}']),
        ('{"answer": 42}', ['{"answer": 42}']),
        ('{"name": "time"} is what I call', ['{"name": "time"} is what I call']),
        ("[1, 2", ["[1, 2"]),
        ("[" * 100_000, ["[" * 100_000]),
    ],
)
def test_calls_are_found_however_the_text_comes(
    text: str, expected: list[str | ToolCall] | None
) -> None:
    expected = [text] if expected is None else expected
    assert divide(text) == expected
    random = np.random.default_rng(len(text))
    for _ in range(20):
        sizes = random.integers(1, 9, min(len(text), 50)).tolist()
        assert divide(text, sizes) == expected
    assert divide(text, [1] * min(len(text), 300)) == expected


def test_text_is_not_held_back_longer_than_needed() -> None:
    finder = ToolCallFinder(NAMES)
    assert finder.push("Hello") == ["Hello"]
    assert finder.push(" <") == []
    assert finder.push("b> you") == [" <b> you"]
    assert finder.push(" <tool_call>") == []
    assert finder.push(CALL + "</tool") == []
    assert finder.push("_call>") == [FOUND]
    assert finder.push("!") == ["!"]
    assert finder.flush() == []


def test_the_schema_of_a_call() -> None:
    city = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": city}},
        {"type": "function", "function": {"name": "time"}},
    ]
    one, two = call_schema(tools)["anyOf"]
    assert one["properties"] == {
        "name": {"const": "weather"},
        "arguments": {"$id": "urn:tool:0", **city},
    }
    assert two["properties"]["arguments"] == {"$id": "urn:tool:1", "type": "object"}
    assert json.dumps(call_schema(tools))
