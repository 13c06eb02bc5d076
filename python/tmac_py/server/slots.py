"""Places for sequences: a KV cache each, kept after an answer for texts that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tmac_py import _core
from tmac_py.decoding import Ids
from tmac_py.server.jobs import Job, Request

LEAST_SHARED = 32
"""Tokens that a copy of another slot's cache has to save."""


@dataclass(frozen=True)
class Leader:
    """A slot at work on a text that begins as another's prompt does.

    Attributes:
        slot: the one.
        job: what it computes.
        n_shared: tokens of the prompt that it holds, or will hold when its own is computed.
    """

    slot: Slot
    job: Job
    n_shared: int

    def is_ready(self, request: Request) -> bool:
        """Whether there is no more to wait for."""
        slot = self.slot
        return (
            slot.job is not self.job or self.job.n_gen > 0 or slot.known(request) >= self.n_shared
        )


class Slot:
    """One KV cache.

    Args:
        cache: keys and values of ``held``.
        chunk: tokens in which prompts are computed.

    Attributes:
        cache: as given.
        held: the tokens that were computed.
        job: what it computes; None if it is idle.
        leader: whose cache it waits for to copy it.
        used: larger the later it was given out.
    """

    def __init__(self, cache: _core.KvCache, chunk: int) -> None:
        self.cache = cache
        self.held: list[int] = []
        self.job: Job | None = None
        self.leader: Leader | None = None
        self.used = 0
        self._chunk = chunk
        self._whole = 0  # of ``held``, computed in whole chunks from the beginning

    def known(self, request: Request) -> int:
        """Tokens of the prompt that can be taken over: not its last, which has to be computed."""
        if request.reuse == "none" or request.score_prompt:
            return 0
        known = _in_common(self.held, request.prompt)
        return known if request.reuse == "any" else self._in_whole_chunks(known)

    def expected(self, request: Request) -> int:
        """The same when the prompt under way is computed."""
        job, known = self.job, self.known(request)
        if job is None or job.n_gen > 0 or request.reuse == "none" or request.score_prompt:
            return known
        coming = _in_common(job.request.prompt, request.prompt)
        if request.reuse == "same bits":
            aligned = self._whole == len(self.held)
            coming = coming // self._chunk * self._chunk if aligned else 0
        return max(known, coming)

    def take(self, job: Job, used: int, leader: Leader | None = None) -> None:
        """Begin with ``job``: forget what does not belong to its prompt."""
        self._take_over(self.known(job.request), job.request)
        job.n_cached = len(self.held)
        self.job, self.used, self.leader = job, used, leader

    def follow(self) -> bool:
        """Copy what the leader holds of the prompt; False while it is too early."""
        leader, job = self.leader, self.job
        assert leader is not None
        assert job is not None
        if not leader.is_ready(job.request):
            return False
        self.leader = None
        known = leader.slot.known(job.request)
        if known > len(self.held):
            try:
                self.cache = leader.slot.cache.fork()
            except (MemoryError, RuntimeError):  # no room for a copy: it is computed again
                return True
            self.held, self._whole = list(leader.slot.held), leader.slot._whole
            self._take_over(known, job.request)
            job.n_cached = len(self.held)
        return True

    def grow(self, ids: Ids) -> None:
        """Note that ``ids`` were computed, in one pass."""
        if len(ids) == self._chunk and len(self.held) == self._whole:
            self._whole += self._chunk
        self.held.extend(ids.tolist())

    def rewind(self, n: int) -> None:
        """Forget the tokens from ``n`` on, and with caches of codes maybe some before."""
        self.cache.truncate(n)
        n = self.cache.pos
        del self.held[n:]
        self._whole = self._in_whole_chunks(n)

    def rewind_to_chunk(self, n: int) -> None:
        """The same, and what is left of a chunk: all that is held was computed in whole ones."""
        self.rewind(n)
        while len(self.held) > self._whole:
            self.rewind(self._whole)

    def _take_over(self, known: int, request: Request) -> None:
        """Keep so many tokens, or as many fewer as the cache and ``request.reuse`` make it."""
        if request.reuse == "any":
            self.rewind(known)
        else:
            self.rewind_to_chunk(known)

    def _in_whole_chunks(self, n: int) -> int:
        """Of the first ``n`` tokens those in chunks as a prompt from its beginning has them."""
        return min(self._whole, n) // self._chunk * self._chunk

    def todo(self, job: Job, n: int) -> Ids:
        """The next tokens to compute, at most ``n``: int32."""
        start = len(self.held)
        return np.array(job.text[start : start + n], dtype=np.int32)


def place(job: Job, slots: Sequence[Slot], used: int) -> None:
    """Give ``job`` one of the idle among ``slots``.

    It gets the one that holds most of its prompt's beginning, else the oldest. Where one that is at
    work has, or soon will have, more of it, the oldest one gets a copy.
    """
    request = job.request
    idle = [slot for slot in slots if slot.job is None]
    best = max(idle, key=lambda slot: (slot.known(request), -slot.used))
    leaders = [
        Leader(slot, slot.job, slot.expected(request)) for slot in slots if slot.job is not None
    ]
    leader = max(leaders, key=lambda leader: leader.n_shared, default=None)
    if leader is None or leader.n_shared < best.known(request) + LEAST_SHARED:
        best.take(job, used)
    else:
        min(idle, key=lambda slot: slot.used).take(job, used, leader)


def _in_common(text: Sequence[int] | Ids, prompt: Ids) -> int:
    """Tokens with which ``text`` begins as ``prompt`` does, but for its last one."""
    start = np.array(text[: len(prompt) - 1], dtype=np.int32)
    differing = np.flatnonzero(start != prompt[: len(start)])
    return int(differing[0]) if len(differing) else len(start)
