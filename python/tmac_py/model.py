"""A language model in memory: load a .lut, run it, generate text with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tmac_py import _core
from tmac_py.checks import check_ids, check_kv, check_tables, check_threads, check_whole
from tmac_py.completions import CompletionMethods
from tmac_py.config import ModelConfig
from tmac_py.constraints import Constraints
from tmac_py.decoder import build_decoder
from tmac_py.decoding import PREFILL_CHUNK
from tmac_py.embedding import OnePooling, Pooling, Texts, embed
from tmac_py.errors import ContextError, ModelFileError, OptionError, TmacError
from tmac_py.generation_defaults import load_defaults
from tmac_py.lutfile import LutFile
from tmac_py.pool import thread_pool
from tmac_py.session import Session
from tmac_py.spec import Tables
from tmac_py.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tmac_py.chat import ChatTemplate, Message

_BUSY = "in use by another thread"
"""What the core says of such a cache."""

Ids = NDArray[np.int32]
Logits = NDArray[np.float32]


class Model(CompletionMethods):
    """One loaded model. Load it with :meth:`load`; a context manager.

    The weights stay in the mapped file and are never changed: one model serves any number of
    threads, each generation with a KV cache of its own.

    Attributes:
        path: the .lut file.
        file: its contents.
        config: sizes and special tokens.
        threads: threads the core computes with.
        tables: "int8", "exact" or "exact8".
        sampling_defaults: arguments of SamplingParams that the checkpoint's generation_config.json
            named.
    """

    def __init__(
        self,
        file: LutFile,
        path: Path,
        *,
        threads: int | None = None,
        tables: Tables | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Build from an open file, which the model then owns; :meth:`load` is the usual way."""
        self.path = path
        self.config: ModelConfig = file.config
        self.threads = check_threads(threads)
        self.tables = check_tables(self.config.default_tables if tables is None else tables)
        files = file.tokenizer
        self._tokenizer = Tokenizer(files, bos_id=file.config.bos_token_id) if files else None
        self.sampling_defaults = load_defaults(files)
        self._template_source = chat_template
        self._template: ChatTemplate | None = None
        self._constraints: Constraints | None = None
        self._pool = thread_pool(self.threads)
        self._decoder: _core.Decoder | None = build_decoder(file, self.tables)
        self.file = file

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        tables: Tables | None = None,
        check: bool = True,
        chat_template: str | None = None,
    ) -> Model:
        """Open a .lut file.

        Args:
            path: the file.
            threads: 1 to 1024; None takes the performance cores that this process may use (CPU
                affinity and quota included). Models with the same number share the threads.
            tables: lookup tables of "int8" (fast), "exact" (activations rounded to 14 bits, exact
                sums) or "exact8" (to 8 bits per token: BitNet's arithmetic); None takes "exact8"
                for models made for it, "int8" for others. With "exact8" an lm_head of such a model
                that is not ternary gets "exact", as in its training.
            check: compare all tensors with their checksums first.
            chat_template: the text of a jinja2 template in place of the one in the file.

        Raises:
            ModelFileError: the file is missing, damaged, or of another version.
            OptionError: an argument is not allowed.
        """
        check_threads(threads)
        if tables is not None:
            check_tables(tables)
        file = LutFile.open(path, check=check)
        try:
            return cls(
                file, Path(path), threads=threads, tables=tables, chat_template=chat_template
            )
        except BaseException:
            file.close()
            raise

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary; ModelFileError for a file without one, which knows only token ids."""
        if self._tokenizer is None:
            raise ModelFileError(f"{self.path}: the file carries no tokenizer")
        return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The template of a chat model, None for others.

        Raises TmacError: it is not a valid one, or the model was closed before its first use.
        """
        if self._template is None and self._tokenizer is not None:
            from tmac_py.chat import ChatTemplate, find_template  # jinja2 takes a while to import

            self._open_decoder()  # the file is open as long as that
            source = self._template_source or find_template(
                self.file.tokenizer, self._tokenizer.config
            )
            names = {"bos_token": self.tokenizer.bos_token, "eos_token": self.tokenizer.eos_token}
            known = {name: token for name, token in names.items() if token is not None}
            self._template = None if source is None else ChatTemplate(source, known)
        return self._template

    @property
    def constraints(self) -> Constraints:
        """What gives answers a form; ModelFileError for a file without a tokenizer."""
        if self._constraints is None:
            self._constraints = Constraints(self.tokenizer, self.config)
        return self._constraints

    @property
    def n_ctx(self) -> int:
        """The most tokens the model was made for, prompt and answer together."""
        return self.config.max_position_embeddings

    def new_cache(self, n_ctx: int = 0, kv: str = "f16") -> _core.KvCache:
        """An empty KV cache for one sequence of up to ``n_ctx`` tokens; 0 = all the model allows.

        Args:
            n_ctx: tokens.
            kv: how keys and values are stored: "f16", "int8" (0.6 of that memory), "int4" (a
                third), or keys and values apart, as in "int8/int4".

        Raises:
            ContextError: ``n_ctx`` is more than the model allows, or there is not enough memory.
            OptionError: ``kv`` is none of these.
        """
        keys, values = check_kv(kv)
        self._open_decoder()
        n_ctx = self._check_n_ctx(n_ctx)
        config = self.config
        try:
            return _core.KvCache(
                n_layers=config.num_hidden_layers,
                n_kv_heads=config.num_key_value_heads,
                head_dim=config.head_dim,
                n_ctx=n_ctx,
                keys=keys,
                values=values,
            )
        except (MemoryError, RuntimeError, ValueError) as error:
            raise ContextError(
                f"no memory for a context of {n_ctx} tokens; choose a smaller one (n_ctx)"
            ) from error

    def forward(
        self, ids: ArrayLike, cache: _core.KvCache, logits: Literal["last", "all"] = "last"
    ) -> Logits:
        """Run ``ids`` through the model after what ``cache`` holds, which grows by them.

        Args:
            ids: token ids, at least one.
            cache: from :meth:`new_cache`; one thread at a time may use it.
            logits: for the last id or for all.

        Returns:
            float32 [vocab] for "last", float32 [n, vocab] for "all".

        Raises:
            ContextError: the cache has no room for so many.
            OptionError: an id is outside the vocabulary, or the cache is another model's.
            TmacError: another thread uses the cache, or the model is closed.
        """
        return self.forward_batch([ids], [cache], logits)[0]

    def forward_batch(
        self,
        ids: Sequence[ArrayLike],
        caches: Sequence[_core.KvCache],
        logits: Literal["last", "all"] = "last",
        times: _core.StepTimes | None = None,
    ) -> list[Logits]:
        """Run several sequences through the model in one pass over the weights.

        Up to 16 ids in all, each sequence gets what it would get alone, bit for bit; more are
        multiplied as the ids of one longer prompt are.

        Args:
            ids: for each sequence its next ids, at least one.
            caches: what came before, one for each sequence; each grows by its ids.
            logits: for the last id of each or for all.
            times: adds up what the parts of the step take.

        Returns:
            for each sequence float32 [vocab] for "last", float32 [n, vocab] for "all".

        Raises:
            as :meth:`forward`; all caches are then unchanged.
        """
        if logits not in ("last", "all"):
            raise OptionError(f"logits is {logits!r}; allowed: 'last', 'all'")
        batch = self._check_batch(ids, caches)
        with _core_errors():
            out = self._open_decoder().forward(batch, self._pool, logits=logits, times=times)
        if logits == "last":
            return list(out)
        return _by_sequence(out, batch)

    def hidden_states(
        self, ids: Sequence[ArrayLike], caches: Sequence[_core.KvCache]
    ) -> list[NDArray[np.float32]]:
        """As :meth:`forward_batch`, but for what the head reads instead of what it gives.

        Returns:
            for each sequence float32 [n, hidden]: the last layer's output after the final norm.
        """
        batch = self._check_batch(ids, caches)
        with _core_errors():
            return _by_sequence(self._open_decoder().hidden_states(batch, self._pool), batch)

    @overload
    def embed(
        self, texts: Texts, *, pooling: OnePooling = "mean", normalize: bool = True
    ) -> NDArray[np.float32]: ...

    @overload
    def embed(
        self, texts: Texts, *, pooling: Literal["none"], normalize: bool = True
    ) -> list[NDArray[np.float32]]: ...

    def embed(
        self, texts: Texts, *, pooling: Pooling = "mean", normalize: bool = True
    ) -> NDArray[np.float32] | list[NDArray[np.float32]]:
        """Embeddings of texts, a row for each: float32 [n, hidden].

        With ``pooling="none"`` a list with float32 [tokens, hidden] for each text. Arguments and
        errors as :func:`tmac_py.embedding.embed`.
        """
        vectors = embed(self, texts, pooling=pooling, normalize=normalize)
        return vectors if pooling == "none" else np.stack(vectors)

    def logits(self, ids: ArrayLike) -> Logits:
        """Logits after each of ``ids`` from an empty context: float32 [n, vocab].

        Raises:
            ContextError: more ids than the model's context.
        """
        checked = self._check_ids(ids)
        if len(checked) > self.n_ctx:
            raise ContextError(f"{len(checked)} tokens, the context holds {self.n_ctx}")
        cache = self.new_cache(len(checked))
        out = np.empty((len(checked), self.config.vocab_size), dtype=np.float32)
        for start in range(0, len(checked), PREFILL_CHUNK):
            end = start + PREFILL_CHUNK
            out[start:end] = self.forward(checked[start:end], cache, "all")
        return out

    def chat_prompt(
        self,
        /,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation by the model's chat template, ready for :meth:`generate`.

        Arguments as :meth:`ChatTemplate.render`. Raises TmacError for a model without a template.
        """
        template = self.chat_template
        if template is None:
            raise TmacError(f"{self.path}: the model has no chat template")
        text = template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, **variables
        )
        return self.tokenizer.encode(text, add_special=False)

    def new_session(self, n_ctx: int = 0, kv: str = "f16") -> Session:
        """An empty :class:`tmac_py.session.Session`; arguments and errors as :meth:`new_cache`."""
        return Session(self, n_ctx=n_ctx, kv=kv)

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._decoder is None

    def close(self) -> None:
        """Let go of file and weights; a generation under way ends with TmacError."""
        self._decoder = None
        self.file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _model(self) -> Model:
        return self

    def _check_batch(
        self, ids: Sequence[ArrayLike], caches: Sequence[_core.KvCache]
    ) -> list[tuple[Ids, _core.KvCache]]:
        if not ids or len(ids) != len(caches):
            raise OptionError(
                f"{len(ids)} sequences of ids and {len(caches)} caches; allowed: as many of each, "
                "at least one"
            )
        batch = [(self._check_ids(own), cache) for own, cache in zip(ids, caches, strict=True)]
        for own, cache in batch:
            if cache.pos + len(own) > cache.n_ctx:
                raise ContextError(
                    f"{len(own)} tokens do not fit: the context holds {cache.n_ctx} "
                    f"and {cache.pos} are in use"
                )
        return batch

    def _open_decoder(self) -> _core.Decoder:
        if self._decoder is None:
            raise TmacError(f"{self.path}: the model is closed")
        return self._decoder

    def check_prompt(self, prompt: str | ArrayLike) -> Ids:
        """Token ids int32 [n] of a text or of ids, n >= 1.

        Raises OptionError for ids outside the vocabulary, or none.
        """
        return self._check_ids(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt)

    def _check_ids(self, ids: ArrayLike) -> Ids:
        return check_ids(ids, self.config.vocab_size)

    def _check_n_ctx(self, n_ctx: int) -> int:
        """``n_ctx`` with 0 replaced by the model's own size."""
        note = " (0 = all the model allows)"
        n_ctx = check_whole("n_ctx", n_ctx, 0, self.n_ctx, note=note, error=ContextError)
        return n_ctx or self.n_ctx


@contextmanager
def _core_errors() -> Iterator[None]:
    """Errors of the core as those of the package."""
    try:
        yield
    except ValueError as error:
        raise OptionError(str(error)) from error
    except RuntimeError as error:
        if _BUSY not in str(error):
            raise
        raise TmacError(str(error)) from error


def _by_sequence(
    rows: NDArray[np.float32], batch: Sequence[tuple[Ids, _core.KvCache]]
) -> list[NDArray[np.float32]]:
    """Rows of all tokens as those of each sequence."""
    return np.split(rows, np.cumsum([len(own) for own, _ in batch])[:-1])
