"""Tool calls in what a chat model writes.

Models are trained to write a call in one of a few forms:

- Hermes, Qwen, SmolLM3: ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, beside text;
- Llama 3: an answer that is ``{"name": ..., "parameters": {...}}``, several of them divided by ";";
- Mistral: an answer that is a list ``[{"name": ..., "arguments": {...}}]`` after a special token.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from tmac_py.generate import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """One call.

    Attributes:
        name: of the function.
        arguments: JSON text of an object.
    """

    name: str
    arguments: str


class ToolCallFinder:
    """Divides one answer into text and tool calls as it comes.

    What may still become a call is held back: from a ``<tool_call>`` to its end, and an answer that
    begins as JSON does to the end of it. What turns out to be none is text.

    Args:
        names: functions that may be called. An answer that is JSON counts as a call of these only.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._held = ""
        self._begun = False  # something but blanks has come
        self._called = False

    def push(self, text: str) -> list[str | ToolCall]:
        """What is certain now, in order."""
        self._held += text
        if not self._begun:
            start = self._held.lstrip()
            if not start or start[0] in "{[":
                return []
            self._begun = True
        return self._divide()

    def flush(self) -> list[str | ToolCall]:
        """What was held back, at the end of the answer."""
        parts = self._divide() if self._begun else []
        held, self._held = self._held, ""
        start = held.lstrip()
        if start.startswith(OPEN):
            call = _read_call(start[len(OPEN) :])
            parts.append(held if call is None else call)
        elif not self._begun and start:
            parts += _read_answer(start, self._names) or [held]
        elif held.strip() or not self._called:
            parts.append(held)
        return [part for part in parts if part]

    def _divide(self) -> list[str | ToolCall]:
        """What is certain of an answer that does not begin as JSON."""
        parts: list[str | ToolCall] = []
        while OPEN in self._held:
            before, _, rest = self._held.partition(OPEN)
            inner, end, after = rest.partition(CLOSE)
            if before.strip():
                parts.append(before.rstrip())
            if not end:
                self._held = OPEN + rest
                return parts
            call = _read_call(inner)
            self._called |= call is not None
            parts.append(OPEN + inner + CLOSE if call is None else call)
            self._held = after
        certain = self._held[: len(self._held) - overlap(self._held, OPEN)].rstrip()
        self._held = self._held[len(certain) :]
        return [*parts, certain] if certain else parts


def call_schema(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON schema of an answer that calls one of ``tools``, which are in OpenAI's shape.

    Schemas of parameters stay documents of their own, so that "#/$defs/..." in one means its own.
    """
    return {"anyOf": [_one_call(i, tool["function"]) for i, tool in enumerate(tools)]}


def _one_call(index: int, function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            "arguments": {"$id": f"urn:tool:{index}", **parameters},
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _read_call(text: str) -> ToolCall | None:
    """The call that is all of ``text``, which is JSON; None if it is none."""
    try:
        return _to_call(json.loads(text, parse_constant=_refuse))
    except (ValueError, RecursionError):
        return None


def _read_answer(text: str, names: Collection[str]) -> list[ToolCall]:
    """The calls that are all of an answer; none if it is anything else."""
    decoder, calls, at = json.JSONDecoder(parse_constant=_refuse), [], 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        for one in value if isinstance(value, list) else [value]:
            call = _to_call(one)
            if call is None or call.name not in names:
                return []
            calls.append(call)
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n;"))
    return calls


def _to_call(value: object) -> ToolCall | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = json.loads(arguments, parse_constant=_refuse)
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
