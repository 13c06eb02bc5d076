"""OpenAI's requests, checked, as what the engine takes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tmac_py.checks import check_whole
from tmac_py.decoding import Ids
from tmac_py.errors import OptionError
from tmac_py.generate import check_stop
from tmac_py.model import Model
from tmac_py.sampling import LogitsProcessor, Sampler, SamplingParams
from tmac_py.server.constraints import Constraints
from tmac_py.server.errors import invalid
from tmac_py.server.fields import (
    read_flag,
    read_object,
    read_objects,
    read_real,
    read_text,
    read_whole,
    refuse,
)
from tmac_py.server.jobs import Request, Reuse

MAX_STOP = 16
MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Asked:
    """A request and how its answer is to be sent.

    Attributes:
        request: for the engine.
        chat: whether the answer is a message.
        stream: as events.
        include_usage: an event with the counts at the end.
        logprobs: with log probabilities.
    """

    request: Request
    chat: bool
    stream: bool
    include_usage: bool
    logprobs: bool


class RequestReader:
    """Reads requests for one model.

    Args:
        model: whose tokenizer and template are used.
        constraints: makes processors of ``response_format``.
        max_tokens: the most tokens of an answer; -1 = what the context allows.
    """

    def __init__(self, model: Model, constraints: Constraints, max_tokens: int = -1) -> None:
        self._model = model
        self._constraints = constraints
        self._max_tokens = max_tokens

    def chat(self, body: Mapping[str, Any], client: str) -> Asked:
        """A request to /v1/chat/completions.

        Raises:
            ApiError, TmacError: it is not allowed; the text says what is.
        """
        refuse(body, functions=([],), function_call=("none",), audio=(), modalities=(["text"],))
        logprobs = read_flag(body, "logprobs")
        top = read_whole(body, "top_logprobs", 0, MAX_TOP_LOGPROBS) or 0
        if top and not logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        return self._asked(
            body, client, self.chat_prompt(body), chat=True, logprobs=logprobs, top_logprobs=top
        )

    def completion(self, body: Mapping[str, Any], client: str) -> Asked:
        """A request to /v1/completions; errors as :meth:`chat`."""
        refuse(body, best_of=(1,), suffix=("",), echo=(False,))
        logprobs = read_whole(body, "logprobs", 0, MAX_TOP_LOGPROBS)
        return self._asked(
            body,
            client,
            self._prompt(body.get("prompt")),
            chat=False,
            logprobs=logprobs is not None,
            top_logprobs=logprobs or 0,
        )

    def chat_text(self, body: Mapping[str, Any]) -> str:
        """The text of the messages, by the model's template."""
        template = self._model.chat_template
        if template is None:
            raise invalid("the model has no chat template; use /v1/completions", "messages")
        messages = _messages(body)
        tools = read_objects(body, "tools")
        choice = body.get("tool_choice")
        if choice not in (None, "auto", "none"):
            raise invalid("tool_choice: allowed: 'auto', 'none'", "tool_choice")
        variables = read_object(body, "chat_template_kwargs")
        reserved = {"messages", "tools", "add_generation_prompt"} & set(variables)
        if reserved:
            raise invalid(
                f"{min(reserved)} has a field of its own in the request", "chat_template_kwargs"
            )
        return template.render(
            messages, tools=tools if tools and choice != "none" else None, **variables
        )

    def chat_prompt(self, body: Mapping[str, Any]) -> Ids:
        """Token ids of the same, int32 [n]."""
        ids = self._model.tokenizer.encode(self.chat_text(body), add_special=False)
        return self._model.check_prompt(ids)

    def _prompt(self, prompt: object) -> Ids:
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise invalid("prompt: allowed: one text, or one list of token ids", "prompt")
        if not prompt:
            raise invalid("the prompt is empty", "prompt")
        return self._model.check_prompt(prompt)  # type: ignore[arg-type]

    def _asked(
        self,
        body: Mapping[str, Any],
        client: str,
        prompt: Ids,
        *,
        chat: bool,
        logprobs: bool,
        top_logprobs: int,
    ) -> Asked:
        refuse(body, n=(1,))
        options = read_object(body, "stream_options")
        processor = self._constraints.processor(body.get("response_format"), len(prompt))
        sampler = self._sampler(body, [] if processor is None else [processor])
        request = Request(
            prompt=prompt,
            sampler=sampler,
            max_tokens=self._limit(body),
            stop=_stop(body.get("stop")),
            top_logprobs=top_logprobs,
            trim_space=chat,
            reuse=_reuse(body, sampler.params),
            client=f"{client} {read_text(body, 'user', '')}",
        )
        return Asked(
            request=request,
            chat=chat,
            stream=read_flag(body, "stream"),
            include_usage=read_flag(options, "include_usage"),
            logprobs=logprobs,
        )

    def _limit(self, body: Mapping[str, Any]) -> int:
        """Tokens of the answer: what is asked for, within what the server allows."""
        limit = self._max_tokens
        for name in ("max_completion_tokens", "max_tokens"):
            wanted = body.get(name)
            if wanted is None or wanted == -1:
                continue
            wanted = read_whole(body, name, 1)
            assert wanted is not None
            return wanted if limit == -1 else min(wanted, limit)
        return limit

    def _sampler(self, body: Mapping[str, Any], processors: Sequence[LogitsProcessor]) -> Sampler:
        given = {
            "temperature": read_real(body, "temperature", 0, 100),
            "top_p": read_real(body, "top_p", 0, 1),
            "min_p": read_real(body, "min_p", 0, 1),
            "top_k": read_whole(body, "top_k", 0),
            "repeat_penalty": read_real(body, "repeat_penalty", 0, 100),
            "repeat_last_n": read_whole(body, "repeat_last_n", -1),
            "presence_penalty": read_real(body, "presence_penalty", -2, 2),
            "frequency_penalty": read_real(body, "frequency_penalty", -2, 2),
            "logit_bias": self._bias(read_object(body, "logit_bias")),
            "seed": read_whole(body, "seed", -(2**63), 2**64 - 1),
        }
        sampling: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        if "seed" in sampling:
            sampling["seed"] %= 2**64  # OpenAI's seeds may be negative
        return Sampler(SamplingParams(**{**self._model.sampling_defaults, **sampling}), processors)

    def _bias(self, bias: Mapping[str, Any]) -> dict[int, float]:
        """OpenAI's bias, -100 to 100, where -100 forbids a token and 100 leaves no other."""
        checked = {}
        for key, value in bias.items():
            try:
                token = int(key)
            except ValueError:
                raise invalid(f"logit_bias: {key!r} is no token id", "logit_bias") from None
            check_whole("a token id of logit_bias", token, 0, self._model.config.vocab_size - 1)
            number = read_real({"logit_bias": value}, "logit_bias", -100, 100)
            if number is None:
                raise invalid(f"logit_bias of token {token} is null", "logit_bias")
            checked[token] = -math.inf if number == -100 else number
        return checked


def _reuse(body: Mapping[str, Any], params: SamplingParams) -> Reuse:
    """What may be taken over of other prompts: for who asks for the same answer, the same bits."""
    repeatable = params.seed is not None or params.temperature == 0
    if body.get("cache_prompt") is None:
        return "same bits" if repeatable else "any"
    return "any" if read_flag(body, "cache_prompt") else "none"


def _stop(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    if not isinstance(stop, str | list) or (isinstance(stop, list) and len(stop) > MAX_STOP):
        raise invalid(f"stop: allowed: a text, or a list of up to {MAX_STOP}", "stop")
    try:
        return check_stop(stop)
    except OptionError as error:
        raise invalid(str(error), "stop") from error


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages as templates know them: plain texts, arguments of calls as objects."""
    messages = read_objects(body, "messages")
    if not messages:
        raise invalid("messages is missing or empty; allowed: a list of messages", "messages")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    where = f"messages[{index}]"
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise invalid(f"{where} has no role", "messages")
    read = {key: value for key, value in message.items() if value is not None}
    read["content"] = _content(where, message.get("content"))
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise invalid(f"{where}.tool_calls: allowed: a list", "messages")
        read["tool_calls"] = [_call(where, call) for call in calls]
    return read


def _content(where: str, content: object) -> str:
    """A text; of a list of parts the texts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{where}.content: allowed: a text, or a list of text parts", "messages")
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise invalid(f"{where}.content: only parts of type 'text' are supported", "messages")
    return "".join(part["text"] for part in content)


def _call(where: str, call: object) -> dict[str, Any]:
    """A tool call; its arguments, JSON in a text, as the object that templates expect."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise invalid(f"{where}.tool_calls: a call without function", "messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise invalid(f"{where}.tool_calls: arguments are not JSON", "messages") from error
    return {**call, "function": {**function, "arguments": arguments}}
