"""Messages and tools in OpenAI's shape as chat templates know them."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from tmac_py.errors import OptionError


def read_messages(messages: object) -> list[dict[str, Any]]:
    """The messages with plain texts, and with the arguments of calls as objects.

    Raises OptionError: there are none, or one is malformed.
    """
    if messages is None or messages == []:
        raise OptionError("messages is missing or empty; allowed: a list of messages")
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) for m in messages):
        raise OptionError(f"messages is {reprlib.repr(messages)}; allowed: a list of objects")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def read_tools(tools: object) -> list[dict[str, Any]]:
    """The tools; none for None. OptionError: one is malformed."""
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise OptionError(f"tools is {reprlib.repr(tools)}; allowed: a list of objects")
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise OptionError(f"tools[{i}] has no function with a name")
        if not isinstance(function.get("parameters", {}), Mapping | None):
            raise OptionError(f"tools[{i}].function.parameters: allowed: an object")
    return [dict(tool) for tool in tools]


def choose_tools(tools: list[dict[str, Any]], choice: object) -> tuple[list[dict[str, Any]], bool]:
    """Those that OpenAI's ``tool_choice`` leaves, and whether one of them has to be called."""
    if choice == "none":
        return [], False
    if choice in (None, "auto"):
        return tools, False
    if isinstance(choice, Mapping) and isinstance(choice.get("function"), Mapping):
        name = choice["function"].get("name")
        tools = [tool for tool in tools if tool["function"]["name"] == name]
    elif choice != "required":
        raise OptionError("tool_choice: allowed: 'auto', 'none', 'required', or a function")
    if not tools:
        raise OptionError("tool_choice: there is no such tool")
    return tools, True


def _message(where: str, message: Mapping[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise OptionError(f"{where} has no role")
    read = {key: value for key, value in message.items() if value is not None}
    read["content"] = _content(where, message.get("content"))
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise OptionError(f"{where}.tool_calls: allowed: a list")
        read["tool_calls"] = [_call(where, call) for call in calls]
    return read


def _content(where: str, content: object) -> str:
    """A text; of a list of parts the texts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise OptionError(f"{where}.content: allowed: a text, or a list of text parts")
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise OptionError(f"{where}.content: only parts of type 'text' are supported")
    return "".join(part["text"] for part in content)


def _call(where: str, call: object) -> dict[str, Any]:
    """A tool call; its arguments, JSON in a text, as the object that templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise OptionError(f"{where}.tool_calls: a call without function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{where}.tool_calls: arguments are not JSON") from error
    return {**call, "function": {**function, "arguments": arguments}}
