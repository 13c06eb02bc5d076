"""Continuous batching: the answers of several clients, computed together step by step.

One thread owns the model. A step decodes one token of every answer that is under way, in one pass
over the weights, and computes a bounded part of the prompts of others, so that a long prompt does
not hold up the answers. Prompts and answers are passed to the core apart, up to 16 answers
at once, and prompts are divided in the same places whatever else is under way: each request gets
what it would get alone, bit for bit.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from tmac_py.checks import check_whole
from tmac_py.decoding import SAME_BITS, Ids
from tmac_py.errors import ContextError, TmacError
from tmac_py.server.fair_queue import FairQueue
from tmac_py.server.jobs import BusyError, CancelledError, Job, Request, Sink
from tmac_py.server.slots import Slot, choose_slot

if TYPE_CHECKING:
    from tmac_py.model import Model

MAX_PARALLEL = 256


@dataclass
class Counters:
    """What the engine has done since it was made; seconds are those of the core's calls."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    n_decode: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Engine:
    """Computes answers for up to ``parallel`` clients at a time; the others wait their turn.

    :meth:`submit` and :meth:`cancel` may be called from any thread.

    Attributes:
        model: what answers.
        parallel: number of slots.
        n_ctx: tokens of prompt and answer that a slot has room for.
        counters: what was done so far.
    """

    def __init__(
        self,
        model: Model,
        *,
        parallel: int = 8,
        n_ctx: int = 0,
        kv: str = "f16",
        chunk: int = 64,
        max_queue: int = 256,
    ) -> None:
        """Make the slots; :meth:`start` begins to work.

        Args:
            model: stays the caller's, who closes it after the engine.
            parallel: slots, 1 to 256.
            n_ctx: tokens a slot has room for; 0 = all the model allows.
            kv: how keys and values are stored, see ``Model.new_cache``.
            chunk: prompt tokens that are computed between two tokens of an answer.
            max_queue: requests that may wait; further ones are refused.

        Raises:
            ContextError: ``n_ctx`` is more than the model allows, or there is not enough memory.
            OptionError: another argument is not allowed.
        """
        self.model = model
        self.parallel = check_whole("parallel", parallel, 1, MAX_PARALLEL)
        self.counters = Counters()
        self._chunk = check_whole("chunk", chunk, 1)
        self._max_queue = check_whole("max_queue", max_queue, 0)
        self._slots = [Slot(model.new_cache(n_ctx, kv), chunk) for _ in range(parallel)]
        self.n_ctx = self._slots[0].cache.n_ctx
        self._queue: FairQueue[Job] = FairQueue()
        self._lock = threading.Condition()
        self._turns = itertools.count(1)
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def n_active(self) -> int:
        """Requests that have a slot."""
        return sum(slot.job is not None for slot in self._slots)

    @property
    def n_waiting(self) -> int:
        """Requests that wait for one."""
        with self._lock:
            return len(self._queue)

    def start(self) -> None:
        """Begin to work, in a thread of the engine's own."""
        self._thread = threading.Thread(target=self._work, name="tmac-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel what is under way and end the thread. More may be called, and does nothing."""
        with self._lock:
            self._closing = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
        self._end_all(CancelledError("the server is shutting down"))

    def submit(self, request: Request, sink: Sink) -> Job:
        """Queue ``request``; ``sink`` gets its answer. Returns what :meth:`cancel` takes.

        Raises:
            ContextError: the prompt leaves no room for an answer.
            OptionError: the prompt has ids outside the vocabulary, or none.
            BusyError: too many requests wait.
            TmacError: the engine is closed.
        """
        n_prompt = len(self.model.check_prompt(request.prompt))
        room = self.n_ctx - n_prompt
        if room < 1:
            raise ContextError(
                f"the prompt has {n_prompt} tokens, the context holds {self.n_ctx} "
                "and must leave room for at least one more"
            )
        for token in request.sampler.params.logit_bias:
            high = self.model.config.vocab_size - 1
            check_whole("a token id of logit_bias", token, 0, high)
        if request.max_tokens != -1:
            note = ", or -1 (until the context is full)"
            room = min(room, check_whole("max_tokens", request.max_tokens, 1, note=note))
        job = Job(request, sink, self.model, room)
        with self._lock:
            if self._closing:
                raise TmacError("the server is shutting down")
            idle = self.parallel - self.n_active
            if len(self._queue) >= self._max_queue + idle:
                raise BusyError(f"{len(self._queue)} requests are waiting; try again later")
            self._queue.push(request.client, job)
            self._lock.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Give up ``job``: its slot is free before the next step. Without effect if it is done."""
        with self._lock:
            job.cancelled = True
            waiting = self._queue.remove(job.request.client, job)
            self._lock.notify()
        if waiting:
            self._count_end(job, CancelledError("the request was cancelled"))

    def step(self) -> bool:
        """Fill idle slots, decode a token of every answer, compute a part of the prompts.

        Called by the engine's thread; a program without one may call it. Returns False if there was
        nothing to do.
        """
        self._give_out_slots()
        jobs = [(slot, slot.job) for slot in self._slots if slot.job is not None]
        answering = [(slot, slot.todo(job, 1)) for slot, job in jobs if job.n_gen > 0]
        for start in range(0, len(answering), SAME_BITS):
            self._compute(answering[start : start + SAME_BITS], decode=True)
        reading = [(job.turn, slot, job) for slot, job in jobs if job.n_gen == 0]
        budget = self._chunk
        for _, slot, job in sorted(reading, key=lambda row: row[0]):
            part = slot.todo(job, self._chunk)
            if len(part) > budget:
                break
            budget -= len(part)
            job.turn = next(self._turns)
            self._compute([(slot, part)], decode=False)
        return bool(jobs)

    def _work(self) -> None:
        """The engine's thread."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closing or self._queue or self.n_active)
                if self._closing:
                    return
            try:
                self.step()
            except Exception as error:  # a fault of the engine: nobody waits for ever
                self._end_all(error)

    def _give_out_slots(self) -> None:
        """Take slots from cancelled jobs, and give idle ones to those who wait."""
        for slot in self._slots:
            if slot.job is not None and slot.job.cancelled:
                self._free(slot, CancelledError("the request was cancelled"))
        with self._lock:
            idle = [slot for slot in self._slots if slot.job is None]
            while idle and self._queue:
                job = self._queue.pop()
                slot = choose_slot(idle, job.request)
                job.turn = next(self._turns)
                slot.take(job, job.turn)
                idle.remove(slot)

    def _compute(self, parts: Sequence[tuple[Slot, Ids]], *, decode: bool) -> None:
        """Run the parts of several sequences through the model and choose the tokens that follow.

        Where that fails, each is tried alone, so that an error stays with the request it is of.
        """
        started = perf_counter()
        try:
            rows = self.model.forward_batch(
                [ids for _, ids in parts], [slot.cache for slot, _ in parts]
            )
        except Exception as error:
            if len(parts) == 1:
                self._free(parts[0][0], error)
                return
            for part in parts:
                self._compute([part], decode=decode)
            return
        self._count_work(sum(len(ids) for _, ids in parts), perf_counter() - started, decode)
        for (slot, ids), row in zip(parts, rows, strict=True):
            slot.grow(ids)
            job = slot.job
            if job is None or job.cancelled or len(slot.held) < len(job.text):
                continue
            try:
                step = job.sample(row)
            except Exception as error:
                self._free(slot, error)
                continue
            if step.token.finish_reason is not None:
                self.counters.finished += 1
                slot.job = None
            job.tell(step)

    def _count_work(self, n_tokens: int, seconds: float, decode: bool) -> None:
        counters = self.counters
        if decode:
            counters.decode_tokens += n_tokens
            counters.decode_seconds += seconds
            counters.n_decode += 1
        else:
            counters.prompt_tokens += n_tokens
            counters.prompt_seconds += seconds

    def _count_end(self, job: Job, error: Exception) -> None:
        if isinstance(error, CancelledError):
            self.counters.cancelled += 1
        else:
            self.counters.failed += 1
        job.tell(error)

    def _free(self, slot: Slot, error: Exception) -> None:
        """End the slot's job before its answer is complete."""
        job, slot.job = slot.job, None
        if job is not None:
            self._count_end(job, error)

    def _end_all(self, error: Exception) -> None:
        for slot in self._slots:
            self._free(slot, error)
        with self._lock:
            waiting = [self._queue.pop() for _ in range(len(self._queue))]
        for job in waiting:
            self._count_end(job, error)
