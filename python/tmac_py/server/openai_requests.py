"""OpenAI's requests, checked, as what the engine takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tmac_py.checks import check_variables, check_whole
from tmac_py.constraints import Form, response_form, schema_form
from tmac_py.decoding import Ids
from tmac_py.embedding import read_texts
from tmac_py.errors import OptionError
from tmac_py.generate import check_stop
from tmac_py.model import Model
from tmac_py.openai_messages import choose_tools, read_messages, read_tools
from tmac_py.openai_replies import ReplyShape
from tmac_py.sampling import LogitsProcessor, Sampler, SamplingParams
from tmac_py.server.errors import invalid
from tmac_py.server.fields import (
    read_flag,
    read_object,
    read_real,
    read_text,
    read_whole,
    refuse,
)
from tmac_py.server.jobs import Request, Reuse
from tmac_py.tool_calls import call_schema

MAX_STOP = 16
MAX_TOP_LOGPROBS = 20
MAX_TEXTS = 2048
"""Texts to embed in one request, as OpenAI allows."""


@dataclass(frozen=True, kw_only=True)
class Asked(ReplyShape):
    """Requests for the engine and how their answers are to be sent.

    Attributes:
        requests: ``best_of`` of each prompt, those of the first prompt first.
        best_of: of so many answers to a prompt the ``n`` likeliest are sent.
        stream: as events.
    """

    requests: tuple[Request, ...]
    best_of: int
    stream: bool


class RequestReader:
    """Reads requests for one model.

    Args:
        model: whose tokenizer and template are used.
        max_tokens: the most tokens of an answer; -1 = what the context allows.
        max_answers: the most answers to one request.
    """

    def __init__(self, model: Model, max_tokens: int = -1, max_answers: int = 1) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._max_answers = max_answers

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
        tools, required = _tools(body)
        form = schema_form(call_schema(tools), "tool_choice") if required else None
        shape = ReplyShape(
            chat=True,
            logprobs=logprobs,
            top_logprobs=top,
            n=self._n(body),
            tools=frozenset(tool["function"]["name"] for tool in tools),
        )
        return self._asked(body, client, [self.chat_prompt(body)], shape, form=form)

    def completion(self, body: Mapping[str, Any], client: str) -> Asked:
        """A request to /v1/completions; errors as :meth:`chat`."""
        refuse(body, suffix=("",))
        logprobs = read_whole(body, "logprobs", 0, MAX_TOP_LOGPROBS)
        texts = _prompts(body.get("prompt"))
        prompts = [self._model.check_prompt(text) for text in texts]
        echo: tuple[str, ...] = ()
        if read_flag(body, "echo"):
            echo = tuple(self._shown(text) for text in texts)
        n = self._n(body)
        shape = ReplyShape(
            chat=False,
            logprobs=logprobs is not None,
            top_logprobs=logprobs or 0,
            n=n,
            echo=echo,
        )
        best_of = read_whole(body, "best_of", n) or n
        if best_of > n and read_flag(body, "stream"):
            raise invalid("best_of above n cannot be streamed", "best_of")
        return self._asked(body, client, prompts, shape, best_of)

    def embedding(self, body: Mapping[str, Any]) -> tuple[list[Ids], bool]:
        """A request to /v1/embeddings: texts, and whether vectors are sent in base64.

        Errors as :meth:`chat`.
        """
        texts = body.get("input")
        if texts is None:
            raise invalid(
                "input is missing; allowed: a text, token ids, or a list of these", "input"
            )
        hidden = self._model.config.hidden_size
        refuse(body, dimensions=(hidden,))
        encoding = read_text(body, "encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise invalid(
                f"encoding_format is {encoding!r}; allowed: 'float', 'base64'", "encoding_format"
            )
        try:
            ids = read_texts(self._model, texts)
        except OptionError as error:
            raise invalid(f"input: {error}", "input") from error
        if len(ids) > MAX_TEXTS:
            raise invalid(f"input has {len(ids)} texts; allowed: up to {MAX_TEXTS}", "input")
        return ids, encoding == "base64"

    def chat_text(self, body: Mapping[str, Any]) -> str:
        """The text of the messages, by the model's template."""
        template = self._model.chat_template
        if template is None:
            raise invalid("the model has no chat template; use /v1/completions", "messages")
        try:
            messages = read_messages(body.get("messages"))
        except OptionError as error:
            raise invalid(str(error), "messages") from error
        tools, _ = _tools(body)
        try:
            variables = check_variables(read_object(body, "chat_template_kwargs"))
        except OptionError as error:
            raise invalid(str(error), "chat_template_kwargs") from error
        return template.render(messages, tools=tools or None, **variables)

    def chat_prompt(self, body: Mapping[str, Any]) -> Ids:
        """Token ids of the same, int32 [n]."""
        ids = self._model.tokenizer.encode(self.chat_text(body), add_special=False)
        return self._model.check_prompt(ids)

    def _n(self, body: Mapping[str, Any]) -> int:
        return read_whole(body, "n", 1, self._max_answers) or 1

    def _shown(self, prompt: str | list[int]) -> str:
        """A prompt as an answer repeats it."""
        if isinstance(prompt, str):
            return prompt
        return self._model.tokenizer.decode(prompt, skip_special=False)

    def _asked(
        self,
        body: Mapping[str, Any],
        client: str,
        prompts: Sequence[Ids],
        shape: ReplyShape,
        best_of: int = 0,
        form: Form | None = None,
    ) -> Asked:
        best_of = best_of or shape.n
        if len(prompts) * best_of > self._max_answers:
            raise invalid(
                f"{len(prompts) * best_of} answers in one request; allowed: {self._max_answers}"
            )
        options = read_object(body, "stream_options")
        params = self._sampling(body)
        common: dict[str, Any] = {
            "max_tokens": self._limit(body),
            "stop": _stop(body.get("stop")),
            "top_logprobs": shape.top_logprobs,
            "trim_space": shape.chat,
            "score_prompt": bool(shape.echo) and shape.logprobs,
            "reuse": _reuse(body, params),
            "client": f"{client} {read_text(body, 'user', '')}",
        }
        requests = tuple(
            Request(
                prompt=prompt,
                sampler=Sampler(_with_seed(params, i), self._processors(body, form, len(prompt))),
                **common,
            )
            for prompt in prompts
            for i in range(best_of)
        )
        return Asked(
            requests=requests,
            best_of=best_of,
            stream=read_flag(body, "stream"),
            **{**vars(shape), "include_usage": read_flag(options, "include_usage")},
        )

    def _processors(
        self, body: Mapping[str, Any], form: Form | None, n_prompt: int
    ) -> list[LogitsProcessor]:
        """What keeps an answer in ``form``, else in that of ``response_format``."""
        option = "response_format" if form is None else form.option
        try:
            form = form or response_form(body.get("response_format"))
            return [] if form is None else [self._model.constraints.processor(form, n_prompt)]
        except OptionError as error:
            raise invalid(str(error), option) from error

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

    def _sampling(self, body: Mapping[str, Any]) -> SamplingParams:
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
        return SamplingParams(**{**self._model.sampling_defaults, **sampling})

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


def _with_seed(params: SamplingParams, i: int) -> SamplingParams:
    """Those of the i-th answer to a prompt."""
    if params.seed is None or i == 0:
        return params
    return replace(params, seed=(params.seed + i) % 2**64)


def _prompts(prompt: object) -> list[str | list[int]]:
    """The prompts of a completion, none of them empty."""
    prompts: list[Any] = [prompt]
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        prompts = prompt
    for one in prompts:
        is_ids = isinstance(one, list) and all(type(token) is int for token in one)
        if not isinstance(one, str) and not is_ids:
            raise invalid(
                "prompt: allowed: a text, a list of token ids, or a list of these", "prompt"
            )
        if not one:
            raise invalid("the prompt is empty", "prompt")
    return prompts


def _tools(body: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """The tools that may be called, and whether one has to be."""
    try:
        tools = read_tools(body.get("tools"))
    except OptionError as error:
        raise invalid(str(error), "tools") from error
    try:
        return choose_tools(tools, body.get("tool_choice"))
    except OptionError as error:
        raise invalid(str(error), "tool_choice") from error


def _stop(stop: object) -> tuple[str, ...]:
    if stop is None:
        return ()
    if not isinstance(stop, str | list) or (isinstance(stop, list) and len(stop) > MAX_STOP):
        raise invalid(f"stop: allowed: a text, or a list of up to {MAX_STOP}", "stop")
    try:
        return check_stop(stop)
    except OptionError as error:
        raise invalid(str(error), "stop") from error
