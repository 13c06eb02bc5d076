"""Places for sequences: a KV cache each, kept after an answer for texts that begin alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tmac_py import _core
from tmac_py.decoding import Ids
from tmac_py.server.jobs import Job


class Slot:
    """One KV cache.

    Attributes:
        cache: keys and values of ``held``.
        held: the tokens that were computed.
        job: what it computes; None if it is idle.
        used: larger the later it was given out.
    """

    def __init__(self, cache: _core.KvCache) -> None:
        self.cache = cache
        self.held: list[int] = []
        self.job: Job | None = None
        self.used = 0

    def common(self, prompt: Ids) -> int:
        """Tokens of ``prompt`` that are held already: not its last, which has to be computed."""
        held = np.array(self.held[: len(prompt) - 1], dtype=np.int32)
        differing = np.flatnonzero(held != prompt[: len(held)])
        return int(differing[0]) if len(differing) else len(held)

    def take(self, job: Job, used: int) -> None:
        """Begin with ``job``: forget what does not belong to its prompt."""
        known = self.common(job.request.prompt) if job.request.cache_prompt else 0
        self.cache.truncate(known)
        del self.held[known:]
        job.n_cached = known
        self.job = job
        self.used = used

    def todo(self, job: Job, n: int) -> Ids:
        """The next tokens to compute, at most ``n``: int32."""
        start = len(self.held)
        return np.array(job.text[start : start + n], dtype=np.int32)


def choose_slot(idle: Sequence[Slot], job: Job) -> Slot:
    """Of the ``idle`` ones that which holds most of the prompt's beginning, else the oldest."""
    reuse = job.request.cache_prompt
    return max(idle, key=lambda s: (s.common(job.request.prompt) if reuse else 0, -s.used))
