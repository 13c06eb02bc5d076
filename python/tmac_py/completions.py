"""Completions in OpenAI's shape, with the names and arguments of llama-cpp-python's methods."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, overload

from tmac_py.checks import check_whole
from tmac_py.constraints import FORMS, Form, read_form, response_form, schema_form
from tmac_py.errors import OptionError, TmacError
from tmac_py.generate import Step, Token
from tmac_py.openai_messages import choose_tools, read_messages, read_tools
from tmac_py.openai_replies import Reply, ReplyShape
from tmac_py.options import GenerationOptions
from tmac_py.plans import DEFAULT_MAX_TOKENS
from tmac_py.sampling import Ids, Logits, check_processors, top_logprobs
from tmac_py.text_methods import TextMethods, chat_ids
from tmac_py.tool_calls import call_schema

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tmac_py.chat import Message
    from tmac_py.model import Model

MAX_LOGPROBS = 20


class CompletionOptions(GenerationOptions, total=False):
    """Keyword arguments of the two methods: :class:`tmac_py.options.GenerationOptions` and these.

    ``max_tokens`` None, 0 or -1 is no limit but the context's, ``seed`` -1 a random one, and the
    token ids of ``logit_bias`` may be texts, as in JSON.

    Attributes:
        response_format: OpenAI's: {"type": "json_object"}, with a "schema" if you like, or
            {"type": "json_schema", "json_schema": {"schema": ...}}. Needs llguidance.
        model: the name in the answer; left out: that of the file.
        stream_options: {"include_usage": True} ends an answer in chunks with one of the counts.
        n_ctx, kv: as for ``Model.stream``.
    """

    response_format: Mapping[str, Any] | None
    model: str | None
    stream_options: Mapping[str, Any] | None
    n_ctx: int
    kv: str


Json = dict[str, Any]


class CompletionMethods(TextMethods):
    """The part of Model that programs written for llama-cpp-python know."""

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[False] = False,
        logprobs: int | None = None,
        echo: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> Json: ...

    @overload
    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        stream: Literal[True],
        logprobs: int | None = None,
        echo: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> Generator[Json, None, None]: ...

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        stream: bool = False,
        logprobs: int | None = None,
        echo: bool = False,
        **options: Unpack[CompletionOptions],
    ) -> Json | Generator[Json, None, None]:
        """Continue ``prompt``: a "text_completion" object, or its chunks.

        Args:
            prompt: text or token ids.
            stream: give chunks as they come.
            logprobs: log probabilities of the tokens, and of so many alternatives, 0 to 20.
            echo: the text begins with the prompt; not together with ``logprobs``.
            options: see :class:`CompletionOptions`. ``max_tokens`` left out is 256, not 16.

        Raises:
            as ``Model.stream``; and TmacError for an answer that ``cancel`` cut short.
        """
        if echo and logprobs is not None:
            raise OptionError("echo and logprobs; allowed: either (Model.score has the prompt's)")
        shape = ReplyShape(
            chat=False,
            echo=(_text(self._model, prompt),) if echo else (),
            logprobs=logprobs is not None,
            top_logprobs=0
            if logprobs is None
            else check_whole("logprobs", logprobs, 0, MAX_LOGPROBS),
            include_usage=_include_usage(options),
        )
        return _answer(self._model, prompt, shape, stream, options)

    @overload
    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        **options: Unpack[CompletionOptions],
    ) -> Json: ...

    @overload
    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        **options: Unpack[CompletionOptions],
    ) -> Generator[Json, None, None]: ...

    def create_chat_completion(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
        **options: Unpack[CompletionOptions],
    ) -> Json | Generator[Json, None, None]:
        """Answer ``messages``: a "chat.completion" object, or its chunks.

        Args:
            messages: as OpenAI has them; contents in parts of type "text" and tool calls too.
            stream: give chunks as they come.
            tools: passed to the chat template; calls that the model writes are the answer's
                "tool_calls".
            tool_choice: "auto", "none" to leave the tools out, "required" or {"type": "function",
                "function": {"name": ...}} to make the model call one (needs llguidance).
            chat_template_kwargs: more names for the template.
            logprobs: log probabilities of the tokens.
            top_logprobs: and of so many alternatives, 0 to 20.
            options: see :class:`CompletionOptions`. ``max_tokens`` left out is no limit.

        Raises:
            as ``Model.chat``; and TmacError for an answer that ``cancel`` cut short.
        """
        chosen, required = choose_tools(read_tools(tools), tool_choice)
        if top_logprobs and not logprobs:
            raise OptionError("top_logprobs needs logprobs=True")
        shape = ReplyShape(
            chat=True,
            logprobs=bool(logprobs),
            top_logprobs=check_whole("top_logprobs", top_logprobs or 0, 0, MAX_LOGPROBS),
            include_usage=_include_usage(options),
            tools=frozenset(tool["function"]["name"] for tool in chosen),
        )
        form = schema_form(call_schema(chosen), "tool_choice") if required else None
        ids = chat_ids(
            self._model,
            read_messages(messages),
            chosen or None,
            chat_template_kwargs,
        )
        if options.get("trim_space") is None:
            options["trim_space"] = True
        options.setdefault("max_tokens", None)
        return _answer(self._model, ids, shape, stream, options, form)


def _answer(
    model: Model,
    prompt: str | Sequence[int],
    shape: ReplyShape,
    stream: bool,
    options: CompletionOptions,
    form: Form | None = None,
) -> Json | Generator[Json, None, None]:
    """``form`` is that of the answer, unless the options ask for one."""
    reply = Reply(shape, model.tokenizer, options.get("model") or model.path.stem)
    alternatives = _Alternatives(shape.top_logprobs)
    wanted = _generation_options(options)
    ids = model.check_prompt(prompt).tolist()
    processors = list(check_processors(wanted.get("logits_processor") or ()))
    if shape.top_logprobs:
        processors.insert(0, alternatives)
    asked = response_form(options.get("response_format"))
    if len([one for one in (form, asked, read_form(options)) if one is not None]) > 1:
        raise OptionError(
            "several forms of one answer; allowed: one of response_format, tool_choice, "
            f"{', '.join(FORMS)}"
        )
    form = form or asked
    if form is not None:
        processors.append(model.constraints.processor(form, len(ids)))
    wanted["logits_processor"] = processors
    tokens = model.stream(ids, n_ctx=options.get("n_ctx", 0), kv=options.get("kv", "f16"), **wanted)
    steps = _steps(tokens, alternatives)
    return _chunks(reply, steps) if stream else _whole(reply, steps)


def _whole(reply: Reply, steps: Generator[Step, None, None]) -> Json:
    done = list(steps)
    if not done or done[-1].token.finish_reason is None:
        raise TmacError("the completion was cancelled before it was complete")
    return reply.whole(done)


def _chunks(reply: Reply, steps: Generator[Step, None, None]) -> Generator[Json, None, None]:
    with closing(steps):
        yield from reply.opening()
        for step in steps:
            yield from reply.chunks(step)


def _steps(
    tokens: Generator[Token, None, None], alternatives: _Alternatives
) -> Generator[Step, None, None]:
    with closing(tokens):
        for token in tokens:
            yield Step(token, alternatives.last)


class _Alternatives:
    """A processor that changes nothing and keeps the ``n`` likeliest tokens of the last place."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.last: tuple[tuple[int, float], ...] = ()

    def __call__(self, _ids: Ids, logits: Logits) -> None:
        self.last = tuple(top_logprobs(logits, self._n))


def _text(model: Model, prompt: str | Sequence[int]) -> str:
    """A prompt as an answer repeats it."""
    if isinstance(prompt, str):
        return prompt
    return model.tokenizer.decode(model.check_prompt(prompt).tolist(), skip_special=False)


def _include_usage(options: CompletionOptions) -> bool:
    given = options.get("stream_options")
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(f"stream_options is {given!r}; allowed: a mapping")
    return given is not None and bool(given.get("include_usage"))


def _generation_options(options: CompletionOptions) -> GenerationOptions:
    """The part of ``options`` that ``Model.stream`` takes, in its terms."""
    own = CompletionOptions.__annotations__.keys() - GenerationOptions.__annotations__.keys()
    wanted: Any = {name: value for name, value in options.items() if name not in own}
    limit = wanted.get("max_tokens", DEFAULT_MAX_TOKENS)
    wanted["max_tokens"] = -1 if limit is None or limit in range(-1, 1) else limit
    if wanted.get("seed") == -1:
        wanted["seed"] = None
    bias = wanted.get("logit_bias")
    if isinstance(bias, Mapping):
        wanted["logit_bias"] = {_token_id(token): value for token, value in bias.items()}
    checked: GenerationOptions = wanted
    return checked


def _token_id(token: object) -> object:
    """JSON has only texts for keys."""
    return int(token) if isinstance(token, str) and token.isdecimal() else token
