"""The steps of a generation: prefill, then token by token. Knows ids and logits, no text."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tmac_py.sampling import Sampler

PREFILL_CHUNK = 256
"""Prompt tokens per call of the core, which takes as many through a layer at once. Ctrl-C and
cancellation are answered between calls."""

SAME_BITS = 16
"""Ids in one pass that get the bits each would get alone (``Model.forward_batch``)."""

Ids = NDArray[np.int32]
Logits = NDArray[np.float32]
Progress = Callable[[int, int], None]


class Cache(Protocol):
    """What the steps need of a KV cache."""

    @property
    def pos(self) -> int:
        """Tokens it holds."""

    @property
    def n_ctx(self) -> int:
        """Tokens it has room for."""

    def truncate(self, pos: int) -> None:
        """Forget the tokens from ``pos`` on, and maybe some before (docs/attention.md)."""


CacheT_contra = TypeVar("CacheT_contra", bound=Cache, contravariant=True)
CacheT = TypeVar("CacheT", bound=Cache)


class Forward(Protocol[CacheT_contra]):
    """One step of a model."""

    def __call__(
        self, ids: Ids, cache: CacheT_contra, logits: Literal["last", "all"] = "last"
    ) -> Logits:
        """Ids int32 [n] -> logits float32 [vocab] of the last, or [n, vocab]; the cache grows."""


def prefill(
    forward: Forward[CacheT], cache: CacheT, prompt: Ids, progress: Progress | None = None
) -> Logits:
    """Logits [vocab] after the last token of ``prompt`` [n], n >= 1.

    ``progress(done, total)`` is called after each chunk.
    """
    total = len(prompt)
    for start in range(0, total, PREFILL_CHUNK):
        logits = forward(prompt[start : start + PREFILL_CHUNK], cache)
        if progress is not None:
            progress(min(start + PREFILL_CHUNK, total), total)
    return logits


def decode(
    forward: Forward[CacheT], cache: CacheT, logits: Logits, sampler: Sampler, history: list[int]
) -> Generator[tuple[int, float], None, None]:
    """Tokens and their log probabilities, without end; each is appended to ``history``.

    ``logits`` are those after the last token of ``history``. The cache holds all but the last.
    """
    while True:
        token, logprob = sampler.sample(logits, history)
        history.append(token)
        yield token, logprob
        logits = forward(np.array([token], dtype=np.int32), cache)
