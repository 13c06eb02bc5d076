"""Embeddings: what a model has understood of a text, as one vector.

Hidden states after the final norm, brought together over the tokens of a text (pooling) and scaled
to length 1, as sentence-transformers and llama.cpp's ``--embedding`` compute them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.checks import check_whole
from tmac_py.decoding import PREFILL_CHUNK, SAME_BITS, Ids
from tmac_py.errors import ContextError, OptionError

if TYPE_CHECKING:
    from tmac_py.model import Model

OnePooling = Literal["mean", "last", "cls"]
"""One vector of a text: the mean over its tokens, or that of its last or first token."""

Pooling = Literal["mean", "last", "cls", "none"]
"""The same, or "none": one vector for each token."""

Texts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
"""One text or several, each as a ``str`` or as token ids."""

Vectors = NDArray[np.float32]

_Part = tuple[int, int, int]
"""The tokens [begin, end) of a text: its number, begin, end."""


def embed(
    model: Model, texts: Texts, *, pooling: Pooling = "mean", normalize: bool = True
) -> list[Vectors]:
    """Embeddings of ``texts``, each float32 [hidden], or [tokens, hidden] with pooling "none".

    A text's embedding does not depend on the others that are asked for with it.

    Args:
        model: what reads the texts.
        texts: one or several, each a ``str`` or token ids.
        pooling: "mean" over the tokens of a text, its "last" or first ("cls") token, or "none".
        normalize: scale each vector to length 1.

    Raises:
        ContextError: a text has more tokens than the model's context.
        OptionError: an argument is not allowed; a text has no tokens, or ids outside the
            vocabulary.
        TmacError: the model is closed.
    """
    work = Embedder(model, read_texts(model, texts), pooling=pooling, normalize=normalize)
    while work.step():
        pass
    return work.vectors


def read_texts(model: Model, texts: Texts) -> list[Ids]:
    """Token ids int32 [n] of each text; errors as :func:`embed`."""
    if isinstance(texts, str):
        return [model.check_prompt(texts)]
    if not isinstance(texts, Sequence | np.ndarray):
        raise OptionError("texts to embed: allowed: a text, token ids, or a list of these")
    if not len(texts):
        raise OptionError("there is no text to embed")
    if isinstance(texts[0], int | np.integer):
        return [model.check_prompt(texts)]
    return [model.check_prompt(text) for text in texts]


class Embedder:
    """Embeddings of several texts, computed pass by pass.

    Attributes:
        n_tokens: of all texts.
        vectors: so far: for each text float32 [hidden], or [tokens, hidden] with pooling "none".
    """

    def __init__(
        self,
        model: Model,
        texts: Sequence[Ids],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        chunk: int = PREFILL_CHUNK,
    ) -> None:
        """Arguments and errors as :func:`embed`; a pass has about ``chunk`` tokens, at most 256."""
        if pooling not in get_args(Pooling):
            allowed = ", ".join(map(repr, get_args(Pooling)))
            raise OptionError(f"pooling is {pooling!r}; allowed: {allowed}")
        check_whole("chunk", chunk, 1)
        for i, text in enumerate(texts):
            if len(text) > model.n_ctx:
                raise ContextError(
                    f"text {i} has {len(text)} tokens, the context holds {model.n_ctx}"
                )
        self.n_tokens = sum(map(len, texts))
        self.vectors: list[Vectors] = []
        self._model = model
        self._texts = texts
        self._pooling = pooling
        self._normalize = normalize
        # The core would divide passes of more once again.
        self._passes = plan_passes(
            [len(text) for text in texts],
            min(chunk, PREFILL_CHUNK),
            alone=model.config.num_experts > 0,
        )
        self._caches: dict[int, _core.KvCache] = {}
        self._pooled: dict[int, Vectors | NDArray[np.float64]] = {}

    @property
    def complete(self) -> bool:
        """Whether all vectors are there."""
        return len(self.vectors) == len(self._texts)

    def step(self) -> int:
        """Compute one pass; returns its tokens, 0 if there was none left."""
        parts = next(self._passes, None)
        if parts is None:
            return 0
        for i, begin, _ in parts:
            if begin == 0:
                self._caches[i] = self._model.new_cache(len(self._texts[i]))
        rows = self._model.hidden_states(
            [self._texts[i][begin:end] for i, begin, end in parts],
            [self._caches[i] for i, _, _ in parts],
        )
        for (i, begin, end), states in zip(parts, rows, strict=True):
            self._pool(i, begin, states)
            if end == len(self._texts[i]):
                del self._caches[i]
        self._finish()
        return sum(end - begin for _, begin, end in parts)

    def _pool(self, text: int, begin: int, states: Vectors) -> None:
        """Take note of the hidden states [n, hidden] of the tokens from ``begin`` on."""
        pooled = self._pooled
        if self._pooling == "none":
            pooled[text] = np.concatenate([pooled[text], states]) if begin else states
        elif self._pooling == "last":
            pooled[text] = states[-1]
        elif self._pooling == "cls":
            pooled.setdefault(text, states[0])
        else:
            total = pooled.setdefault(text, np.zeros(states.shape[1]))
            for state in states:  # one after the other: the same sum however a text is divided
                total += state

    def _finish(self) -> None:
        """Move what is complete to ``vectors``, in the order of the texts."""
        while (i := len(self.vectors)) in self._pooled and i not in self._caches:
            pooled = self._pooled.pop(i)
            if self._pooling == "mean":
                pooled = pooled / len(self._texts[i])
            if self._normalize:
                pooled = unit_length(pooled)
            self.vectors.append(pooled.astype(np.float32))


def unit_length(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Vectors [..., n], each scaled to length 1; one of zeros stays as it is."""
    wide = x.astype(np.float64)
    length = np.sqrt(np.square(wide).sum(axis=-1, keepdims=True))
    return wide / np.where(length == 0, 1, length)


def plan_passes(
    lengths: Sequence[int], chunk: int, *, alone: bool = False
) -> Iterator[list[_Part]]:
    """Divide texts of these lengths into passes of up to ``chunk`` tokens.

    Products of up to SAME_BITS tokens have other roundings than those of more. So short texts are
    computed in passes of so few, longer ones in parts of more: whatever else is in a pass, and
    however a text is divided, its tokens get the same bits. But where experts take few of a pass's
    tokens or more, that depends on the others: longer texts are then to stand ``alone``.
    """
    least = SAME_BITS + 1
    chunk = max(chunk, 2 * least)  # where one part ends, another must fit
    short = [i for i, n in enumerate(lengths) if n < least]
    long = [i for i, n in enumerate(lengths) if n >= least]
    parts: list[_Part] = []
    room = SAME_BITS
    for i in short:
        if lengths[i] > room:
            yield parts
            parts, room = [], SAME_BITS
        parts.append((i, 0, lengths[i]))
        room -= lengths[i]
    if parts:
        yield parts
    parts, room = [], chunk
    for i in long:
        if alone and parts:
            yield parts
            parts, room = [], chunk
        begin = 0
        while begin < lengths[i]:
            rest = lengths[i] - begin
            end = lengths[i] if rest <= room else begin + min(room, rest - least)
            if end - begin < least:
                yield parts
                parts, room = [], chunk
                continue
            parts.append((i, begin, end))
            room -= end - begin
            begin = end
    if parts:
        yield parts
