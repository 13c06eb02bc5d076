"""What a model does with text; each method stands for a few lines in a module of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

from tmac_py.batch import generate_batch
from tmac_py.checks import check_variables
from tmac_py.decoding import SAME_BITS
from tmac_py.generate import Result, Token
from tmac_py.plans import fix_seed, needed_context

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tmac_py.chat import Message
    from tmac_py.model import Model
    from tmac_py.options import AnswerOptions, GenerationOptions
    from tmac_py.scoring import Score


class TextMethods(ABC):
    """The part of Model that reads and writes text."""

    @property
    @abstractmethod
    def _model(self) -> Model:
        """The model that these are methods of."""

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        n_ctx: int = 0,
        kv: str = "f16",
        **options: Unpack[GenerationOptions],
    ) -> Generator[Token, None, None]:
        """Generate token by token. Arguments are checked at once, work starts with the first token.

        The generator may be closed at any token; the model stays usable.

        Args:
            prompt: text to continue, or token ids (:meth:`Model.chat_prompt` makes them of
                messages).
            n_ctx: size of the context; 0 = what prompt and ``max_tokens`` need, within what the
                model allows.
            kv: how keys and values are stored, see :meth:`Model.new_cache`.
            options: see :class:`tmac_py.options.GenerationOptions`.

        Raises:
            ContextError: the prompt leaves no room for an answer.
            OptionError: an argument is not allowed.
            TmacError: the model is closed.
        """
        model = self._model
        ids = model.check_prompt(prompt)
        size = n_ctx or needed_context(model, len(ids), options.get("max_tokens"))
        return model.new_session(size, kv).stream(ids.tolist(), **options)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        n_ctx: int = 0,
        kv: str = "f16",
        **options: Unpack[GenerationOptions],
    ) -> Result:
        """The whole answer at once: a ``str`` with ids, finish reason and timings.

        Arguments and errors as :meth:`stream`.
        """
        seed = fix_seed(options)
        return Result(list(self.stream(prompt, n_ctx=n_ctx, kv=kv, **options)), seed)

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[False] = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        n_ctx: int = 0,
        kv: str = "f16",
        **options: Unpack[GenerationOptions],
    ) -> Result: ...

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: Literal[True],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        n_ctx: int = 0,
        kv: str = "f16",
        **options: Unpack[GenerationOptions],
    ) -> Generator[Token, None, None]: ...

    def chat(
        self,
        messages: Sequence[Message],
        *,
        stream: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        n_ctx: int = 0,
        kv: str = "f16",
        **options: Unpack[GenerationOptions],
    ) -> Result | Generator[Token, None, None]:
        """The assistant's answer to ``messages``, by the model's chat template.

        Every call computes all messages; :class:`tmac_py.Chat` keeps what it computed.

        Args:
            messages: the turns so far, oldest first: {"role": "user", "content": "..."}.
            stream: give tokens as they come, as :meth:`stream` does, in place of a Result.
            tools: JSON schemas of tools, for templates that know them.
            chat_template_kwargs: more names for the template (``{"enable_thinking": False}``).
            n_ctx, kv, options: as for :meth:`stream`; ``trim_space`` is on unless given.

        Raises:
            TmacError: the model has no template, or it refuses the messages; others as
                :meth:`stream`.
        """
        ids = chat_ids(self._model, messages, tools, chat_template_kwargs)
        if options.get("trim_space") is None:
            options["trim_space"] = True
        answer = self.stream if stream else self.generate
        return answer(ids, n_ctx=n_ctx, kv=kv, **options)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        batch_size: int = SAME_BITS,
        n_ctx: int = 0,
        kv: str = "f16",
        **options: Unpack[AnswerOptions],
    ) -> list[Result]:
        """Answers to several prompts, computed together: one pass over the weights for a token of
        each.

        Each answer is that of :meth:`generate` with the same options, bit for bit. When one is
        complete, the next prompt takes its place.

        Args:
            prompts: as for :meth:`stream`; any number.
            batch_size: answers under way at once, 1 to 16; each has a KV cache of its own.
            n_ctx, kv: as for :meth:`stream`, for each.
            options: see :class:`tmac_py.options.AnswerOptions`; for all alike. Without a seed each
                answer draws its own.

        Returns:
            one Result for each prompt, in their order.

        Raises:
            as :meth:`stream`, before any work.
        """
        return generate_batch(
            self._model, prompts, batch_size=batch_size, n_ctx=n_ctx, kv=kv, **options
        )

    def score(
        self,
        text: str | Sequence[int],
        *,
        after: str | Sequence[int] | None = None,
        kv: str = "f16",
    ) -> Score:
        """Log probabilities of the tokens of ``text``.

        Args:
            text: text or token ids. Without ``after`` its first token (begin-of-text, where the
                model has one) is what the others follow, and is not scored.
            after: text or ids that come before, of which nothing is scored.
            kv: as for :meth:`Model.new_cache`.

        Raises:
            ContextError: more tokens than the model's context.
            OptionError: there is no token to score, or an id is outside the vocabulary.
        """
        from tmac_py.scoring import score

        return score(self._model, text, after, kv)

    def astream(
        self,
        prompt: str | Sequence[int],
        *,
        n_ctx: int = 0,
        kv: str = "f16",
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[Token, None]:
        """As :meth:`stream`, for ``async for``: the loop is free while a token is computed.

        Arguments are checked with the first token. A task that is cancelled, and a loop that is
        left (at once with ``contextlib.aclosing``), stop the work before the next pass over the
        weights.
        """
        from tmac_py import aio

        return aio.iterate(
            lambda stop: self.stream(prompt, n_ctx=n_ctx, kv=kv, **aio.stoppable(options, stop))
        )

    async def agenerate(
        self,
        prompt: str | Sequence[int],
        *,
        n_ctx: int = 0,
        kv: str = "f16",
        **options: Unpack[GenerationOptions],
    ) -> Result:
        """As :meth:`generate`, without blocking the loop; a cancelled task stops the work."""
        from tmac_py import aio

        return await aio.run(
            lambda stop: self.generate(prompt, n_ctx=n_ctx, kv=kv, **aio.stoppable(options, stop))
        )


def chat_ids(
    model: Model,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None,
    names: Mapping[str, Any] | None,
) -> list[int]:
    """``Model.chat_prompt`` with more ``names`` for the template; OptionError for reserved ones."""
    return model.chat_prompt(messages, tools=tools, **check_variables(names or {}))
