"""OpenAI's requests, checked, as what the engine takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tmac_py.checks import check_whole
from tmac_py.constraints import response_form
from tmac_py.decoding import Ids
from tmac_py.errors import OptionError
from tmac_py.generate import check_stop
from tmac_py.model import Model
from tmac_py.openai_messages import read_messages
from tmac_py.openai_replies import ReplyShape
from tmac_py.sampling import LogitsProcessor, Sampler, SamplingParams
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


@dataclass(frozen=True, kw_only=True)
class Asked(ReplyShape):
    """A request and how its answer is to be sent.

    Attributes:
        request: for the engine.
        stream: as events.
    """

    request: Request
    stream: bool


class RequestReader:
    """Reads requests for one model.

    Args:
        model: whose tokenizer and template are used.
        max_tokens: the most tokens of an answer; -1 = what the context allows.
    """

    def __init__(self, model: Model, max_tokens: int = -1) -> None:
        self._model = model
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
        try:
            messages = read_messages(body.get("messages"))
        except OptionError as error:
            raise invalid(str(error), "messages") from error
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
        sampler = self._sampler(body, self._processors(body, len(prompt)))
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
            top_logprobs=top_logprobs,
        )

    def _processors(self, body: Mapping[str, Any], n_prompt: int) -> list[LogitsProcessor]:
        """What keeps the answer in the form of ``response_format``."""
        try:
            form = response_form(body.get("response_format"))
            return [] if form is None else [self._model.constraints.processor(form, n_prompt)]
        except OptionError as error:
            raise invalid(str(error), "response_format") from error

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
