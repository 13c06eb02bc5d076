"""Places for sequences: a KV cache each, kept after an answer for texts that begin alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tmac_py import _core
from tmac_py.decoding import Ids
from tmac_py.server.jobs import Job, Request


class Slot:
    """One KV cache.

    Args:
        cache: keys and values of ``held``.
        chunk: tokens in which prompts are computed.

    Attributes:
        cache: as given.
        held: the tokens that were computed.
        job: what it computes; None if it is idle.
        used: larger the later it was given out.
    """

    def __init__(self, cache: _core.KvCache, chunk: int) -> None:
        self.cache = cache
        self.held: list[int] = []
        self.job: Job | None = None
        self.used = 0
        self._chunk = chunk
        self._whole = 0  # of ``held``, computed in whole chunks from the beginning

    def known(self, request: Request) -> int:
        """Tokens of the prompt that can be taken over: not its last, which has to be computed."""
        if request.reuse == "none":
            return 0
        prompt = request.prompt
        held = np.array(self.held[: len(prompt) - 1], dtype=np.int32)
        differing = np.flatnonzero(held != prompt[: len(held)])
        known = int(differing[0]) if len(differing) else len(held)
        return known if request.reuse == "any" else self._in_whole_chunks(known)

    def take(self, job: Job, used: int) -> None:
        """Begin with ``job``: forget what does not belong to its prompt."""
        known = self.known(job.request)
        self.cache.truncate(known)
        while self.cache.pos < known:  # it forgot more than it was asked to
            known = self.cache.pos
            if job.request.reuse != "any":
                known = self._in_whole_chunks(known)
            self.cache.truncate(known)
        del self.held[known:]
        self._whole = self._in_whole_chunks(known)
        job.n_cached = known
        self.job = job
        self.used = used

    def grow(self, ids: Ids) -> None:
        """Note that ``ids`` were computed, in one pass."""
        if len(ids) == self._chunk and len(self.held) == self._whole:
            self._whole += self._chunk
        self.held.extend(ids.tolist())

    def _in_whole_chunks(self, n: int) -> int:
        """Of the first ``n`` tokens those in chunks as a prompt from its beginning has them."""
        return min(self._whole, n) // self._chunk * self._chunk

    def todo(self, job: Job, n: int) -> Ids:
        """The next tokens to compute, at most ``n``: int32."""
        start = len(self.held)
        return np.array(job.text[start : start + n], dtype=np.int32)


def choose_slot(idle: Sequence[Slot], request: Request) -> Slot:
    """Of the ``idle`` ones that which holds most of the prompt's beginning, else the oldest."""
    return max(idle, key=lambda slot: (slot.known(request), -slot.used))
