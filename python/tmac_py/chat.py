"""Chat templates: messages to the text a chat model was trained on.

Templates come with model files and are code of strangers: they run in jinja2's immutable sandbox,
with the names and settings transformers gives them, and see nothing but plain data.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tmac_py.errors import TmacError

Message = Mapping[str, Any]
"""One turn: "role" ("system", "user", "assistant"), "content", and what else a template reads."""


class ChatTemplate:
    """One compiled template.

    Args:
        source: the template's text.
        special_tokens: names the template may use, such as ``bos_token`` -> ``"<s>"``.

    Raises:
        TmacError: the template is not valid jinja2.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TmacError(
                f"the chat template is not valid jinja2, line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        /,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: the turns so far, oldest first.
            add_generation_prompt: end with the mark that opens the assistant's answer.
            tools: JSON schemas of tools, for templates that know them.
            **variables: more names for the template (``enable_thinking=False``).

        Raises:
            TmacError: messages or tools are malformed, or the template refuses them or fails.
        """
        names: dict[str, Any] = {
            **self._special_tokens,
            **variables,
            "messages": _checked_messages(messages),
            "tools": None if tools is None else _checked_tools(tools),
            "documents": variables.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(names)
        except _RefusedError as error:
            raise TmacError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # whatever a template provokes is the template's fault
            reason = f"{type(error).__name__}: {error}"
            raise TmacError(f"the chat template fails on these messages: {reason}") from error


def find_template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    """The template among a model's tokenizer files: chat_template.jinja or tokenizer_config.json.

    Args:
        files: file name -> content.
        config: the content of tokenizer_config.json, whose ``chat_template`` is a text or a list of
            named ones, of which "default" counts.
    """
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode(errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get("default")
    return template if isinstance(template, str) and template else None


class _RefusedError(jinja2.TemplateError):
    """Raised by a template through ``raise_exception``."""


class _GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}`` marks answers for training; here they pass."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Macro) -> str:
        return str(caller())


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscore names, through which templates left the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # like jinja2's own: "self" is a name too
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    environment.globals.update(functions)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter, with the arguments templates use."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _checked_messages(messages: object) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise TmacError(f"messages is {reprlib.repr(messages)}; allowed: a list of mappings")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TmacError(f"message {i} must be a mapping with a text under 'role'")
    return [dict(message) for message in messages]


def _checked_tools(tools: object) -> list[dict[str, Any]]:
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise TmacError(f"tools is {reprlib.repr(tools)}; allowed: a list of mappings")
    return [dict(tool) for tool in tools]
