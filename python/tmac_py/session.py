"""One text in a model's memory: its tokens and what was computed for them."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tmac_py.cancelling import CancelledStep, cancellable
from tmac_py.checks import check_whole
from tmac_py.decoding import Ids
from tmac_py.errors import ContextError, ModelFileError, OptionError, TmacError
from tmac_py.generate import Result, Token, stream_tokens
from tmac_py.options import GenerationOptions
from tmac_py.plans import Plan, fix_seed, make_plan
from tmac_py.sessionfile import read_session, write_session
from tmac_py.speculative import Drafter, DraftModel, PromptLookup

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tmac_py.model import Model


class Session:
    """A text that grows: made by ``Model.new_session``, ``load`` or ``fork``.

    Of each prompt, what the session already holds of its beginning is not computed again. A session
    is used by one thread at a time; a model serves any number of them.

    Attributes:
        note: any text, such as the messages of a chat as JSON; ``save``, ``load`` and ``fork`` keep
            it.
    """

    def __init__(self, model: Model, *, n_ctx: int = 0, kv: str = "f16") -> None:
        """With room for ``n_ctx`` tokens; arguments and errors as ``Model.new_cache``."""
        self._model = model
        self._kv = kv
        self._cache = model.new_cache(n_ctx, kv)
        self._ids: list[int] = []
        self.note = ""
        self._lock = threading.Lock()

    @property
    def ids(self) -> tuple[int, ...]:
        """The tokens held: of the last prompt and answer all but the last token."""
        return tuple(self._ids)

    @property
    def n_ctx(self) -> int:
        """The most tokens there is room for, prompt and answer together."""
        return self._cache.n_ctx

    @property
    def nbytes(self) -> int:
        """Memory of keys and values when the context is full."""
        return self._cache.nbytes

    def stream(
        self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]
    ) -> Generator[Token, None, None]:
        """Generate token by token after ``prompt``, which is the whole text from its beginning.

        Arguments are checked at once, work starts with the first token. The generator may be closed
        at any token; the session then holds what was said so far.

        Args:
            prompt: text, or token ids (``Model.chat_prompt`` makes them of messages).
            options: see :class:`tmac_py.options.GenerationOptions`.

        Raises:
            ContextError: the prompt leaves no room for an answer.
            OptionError: an option is not allowed.
            TmacError: the model is closed, or another thread uses the session.
        """
        plan = make_plan(self._model, prompt, self.n_ctx, options)
        return self._stream(plan, self._drafter(plan))

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> Result:
        """The whole answer at once: a ``str`` with ids, finish reason and timings.

        Arguments and errors as :meth:`stream`.
        """
        seed = fix_seed(options)
        return Result(list(self.stream(prompt, **options)), seed)

    def astream(
        self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]
    ) -> AsyncGenerator[Token, None]:
        """As :meth:`stream`, for ``async for``; see ``Model.astream``."""
        from tmac_py import aio

        return aio.iterate(lambda stop: self.stream(prompt, **aio.stoppable(options, stop)))

    async def agenerate(
        self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]
    ) -> Result:
        """As :meth:`generate`, without blocking the loop; see ``Model.agenerate``."""
        from tmac_py import aio

        return await aio.run(lambda stop: self.generate(prompt, **aio.stoppable(options, stop)))

    def truncate(self, n: int) -> None:
        """Forget all but the first ``n`` tokens. OptionError if there are fewer.

        In int8 and int4 some of those may be forgotten too, less than 64: ``ids`` are the rest.
        """
        check_whole("n", n, 0, len(self._ids))
        with self._alone():
            self._cache.truncate(n)
            del self._ids[self._cache.pos :]

    def fork(self) -> Session:
        """Another session that holds the same; both go on for themselves."""
        with self._alone():
            other = object.__new__(Session)
            other._model, other._kv = self._model, self._kv
            other._cache = self._cache.fork()
            other._ids = list(self._ids)
            other.note = self.note
            other._lock = threading.Lock()
            return other

    def save(self, path: str | Path) -> None:
        """Write what is held to a file, which :meth:`load` takes with the same model.

        Raises OSError if it cannot be written; a file that was there then stays as it was.
        """
        with self._alone():
            ids = np.array(self._ids, dtype=np.int32)
            state = self._cache.state()
            fingerprint = self._model.file.fingerprint
            write_session(Path(path), fingerprint, self._kv, ids, state, self.note)

    @classmethod
    def load(
        cls, model: Model, path: str | Path, *, n_ctx: int = 0, kv: str | None = None
    ) -> Session:
        """A session that goes on where one was saved.

        Args:
            model: the one it was saved with.
            path: the file.
            n_ctx: room for so many tokens; 0 = all the model allows.
            kv: as it was saved, or None.

        Raises:
            ModelFileError: the file is missing, damaged, or of another model.
            ContextError: it holds more than ``n_ctx`` tokens.
            OptionError: ``kv`` is another than it was saved with.
        """
        saved_kv, ids, state, note = read_session(Path(path), model.file.fingerprint)
        if kv is not None and kv != saved_kv:
            raise OptionError(f"{path}: saved with kv {saved_kv}; allowed: that, not {kv!r}")
        session = cls(model, n_ctx=n_ctx, kv=saved_kv)
        if len(ids) > session.n_ctx:
            raise ContextError(
                f"{path}: holds {len(ids)} tokens, the context has room for {session.n_ctx}"
            )
        try:
            session._cache.restore(state)
        except ValueError as error:
            raise ModelFileError(f"{path}: {error}") from None
        held = session._cache.pos
        if held != len(ids):
            raise ModelFileError(f"{path}: {len(ids)} tokens with the state of {held}")
        session._ids = ids.tolist()
        session.note = note
        return session

    def _stream(self, plan: Plan, drafter: Drafter | None) -> Generator[Token, None, None]:
        with self._alone():
            prompt = plan.prompt
            self._cache.truncate(self._known(prompt))
            known = self._cache.pos
            del self._ids[known:]
            text: list[int] = prompt.tolist()
            tokens = stream_tokens(
                cancellable(self._model.forward, plan.cancel),
                self._cache,
                prompt[known:],
                decoder=plan.decoder,
                sampler=plan.sampler(),
                eos_ids=plan.eos_ids,
                stop=plan.stop,
                max_tokens=plan.room,
                before=text[:known],
                drafter=drafter,
                progress=plan.progress,
            )
            try:
                with closing(tokens), suppress(CancelledStep):
                    for token in tokens:
                        text.append(token.id)
                        yield token
            finally:
                self._ids = text[: self._cache.pos]

    def _known(self, prompt: Ids) -> int:
        """Tokens of ``prompt`` that need not be computed: its last one always does."""
        held = np.array(self._ids[: len(prompt) - 1], dtype=np.int32)
        differing = np.flatnonzero(held != prompt[: len(held)])
        return int(differing[0]) if len(differing) else len(held)

    def _drafter(self, plan: Plan) -> Drafter | None:
        draft = plan.draft
        if draft == "none":
            return None
        if draft == "lookup":
            return PromptLookup()
        if isinstance(draft, str) or not hasattr(draft, "new_cache"):
            raise OptionError(f"draft is {draft!r}; allowed: 'lookup', 'none', or a Model")
        if draft.tokenizer.vocab_size != self._model.tokenizer.vocab_size:
            raise OptionError(
                f"{draft.path}: a vocabulary of {draft.tokenizer.vocab_size} tokens; a draft model "
                f"needs that of {self._model.path}, {self._model.tokenizer.vocab_size}"
            )
        cache = draft.new_cache(min(len(plan.prompt) + plan.room, draft.n_ctx))
        return DraftModel(cancellable(draft.forward, plan.cancel), cache)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """TmacError if the session is in use."""
        if not self._lock.acquire(blocking=False):
            raise TmacError("this session is in use: an answer is under way (close its stream)")
        try:
            yield
        finally:
            self._lock.release()
