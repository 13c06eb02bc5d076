"""Continuous batching: the answers of several clients, computed together step by step.

One thread owns the model. A step decodes one token of every answer that is under way, in one pass
over the weights, and computes a bounded part of the prompts of others, so that a long prompt does
not hold up the answers. Prompts and answers are passed to the core apart, up to 16 answers
at once, and prompts are divided in the same places whatever else is under way: each request gets
what it would get alone, bit for bit. One that is served alone gets several tokens of its answer in
a pass where they can be guessed. Embeddings are computed in turn with prompts.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from tmac_py.checks import check_whole
from tmac_py.decoding import SAME_BITS, Ids
from tmac_py.embedding import Embedder, Pooling
from tmac_py.errors import ContextError, TmacError
from tmac_py.server.embedding_job import EmbeddingJob, EmbeddingSink
from tmac_py.server.fair_queue import FairQueue
from tmac_py.server.jobs import BusyError, CancelledError, Job, Request, Sink
from tmac_py.server.passes import Passes
from tmac_py.server.slots import Slot, place

if TYPE_CHECKING:
    from tmac_py.model import Model

MAX_PARALLEL = 256

AnyJob = TypeVar("AnyJob", Job, EmbeddingJob)


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
        guess: bool = True,
    ) -> None:
        """Make the slots; :meth:`start` begins to work.

        Args:
            model: stays the caller's, who closes it after the engine.
            parallel: slots, 1 to 256.
            n_ctx: tokens a slot has room for; 0 = all the model allows.
            kv: how keys and values are stored, see ``Model.new_cache``.
            chunk: prompt tokens that are computed between two tokens of an answer.
            max_queue: requests that may wait; further ones are refused.
            guess: look up in the text so far what may come next while one client alone is served;
                no answer depends on it.

        Raises:
            ContextError: ``n_ctx`` is more than the model allows, or there is not enough memory.
            OptionError: another argument is not allowed.
        """
        self.model = model
        self.parallel = check_whole("parallel", parallel, 1, MAX_PARALLEL)
        self._chunk = check_whole("chunk", chunk, 1)
        self._max_queue = check_whole("max_queue", max_queue, 0)
        self._guess = guess
        self._slots = [Slot(model.new_cache(n_ctx, kv), chunk) for _ in range(parallel)]
        self.n_ctx = self._slots[0].cache.n_ctx
        self._passes = Passes(model, self._chunk, self.n_ctx)
        self.counters = self._passes.counters
        self._queue: FairQueue[Job] = FairQueue()
        self._texts: FairQueue[EmbeddingJob] = FairQueue()
        self._texts_next = False
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
            return len(self._queue) + len(self._texts)

    @property
    def capacity(self) -> int:
        """The most requests that are taken at a time, those that wait included."""
        return self.parallel + self._max_queue

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
        self._enqueue(self._queue, job, self.parallel - self.n_active)
        return job

    def submit_embedding(
        self,
        texts: Sequence[Ids],
        sink: EmbeddingSink,
        *,
        pooling: Pooling = "mean",
        client: str = "",
    ) -> EmbeddingJob:
        """Queue texts, int32 [n] each, to be embedded; ``sink`` gets all vectors or an error.

        Raises:
            ContextError: a text has more tokens than the model's context.
            OptionError: ``pooling`` is not allowed.
            BusyError: too many requests wait.
            TmacError: the engine is closed.
        """
        job = EmbeddingJob(
            Embedder(self.model, texts, pooling=pooling, chunk=self._chunk), sink, client
        )
        self._enqueue(self._texts, job, 1)
        return job

    def cancel(self, job: Job | EmbeddingJob) -> None:
        """Give up ``job``: its slot is free before the next step. Without effect if it is done."""
        with self._lock:
            job.cancelled = True
            if isinstance(job, Job):
                waiting = self._queue.remove(job.client, job)
            else:
                waiting = self._texts.remove(job.client, job)
            self._lock.notify()
        if waiting:
            self._passes.end(job, CancelledError("the request was cancelled"))

    def step(self) -> bool:
        """Fill idle slots, decode a token of every answer, compute a part of the prompts.

        Called by the engine's thread; a program without one may call it. Returns False if there was
        nothing to do.
        """
        self._give_out_slots()
        jobs = [(slot, slot.job) for slot in self._slots if slot.job is not None]
        answering = [(slot, job) for slot, job in jobs if job.n_gen > 0]
        reading = [(slot, job) for slot, job in jobs if job.n_gen == 0]
        if self._guess and len(jobs) == 1 and answering:
            self._passes.decode_alone(*answering[0])
        else:
            for start in range(0, len(answering), SAME_BITS):
                self._passes.decode([slot for slot, _ in answering[start : start + SAME_BITS]])
        texts = len(self._texts) > 0
        if texts and (self._texts_next or not reading):
            self._embed()
            self._texts_next = False
        else:
            self._read(reading)
            self._texts_next = texts
        return bool(jobs) or texts

    def _work(self) -> None:
        """The engine's thread."""
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._closing or self._queue or self._texts or self.n_active
                )
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
                self._passes.free(slot, CancelledError("the request was cancelled"))
        with self._lock:
            while self._queue and self.n_active < self.parallel:
                job = self._queue.pop()
                job.turn = next(self._turns)
                place(job, self._slots, job.turn)

    def _read(self, reading: Sequence[tuple[Slot, Job]]) -> None:
        """Compute a chunk of prompts in all, those first whose turn it is."""
        budget = self._chunk
        for slot, job in sorted(reading, key=lambda row: row[1].turn):
            if slot.leader is not None and not slot.follow():
                continue
            part = slot.todo(job, self._chunk)
            if len(part) > budget:
                break
            budget -= len(part)
            job.turn = next(self._turns)
            self._passes.read(slot, job, part)

    def _embed(self) -> None:
        """Compute one pass of the texts whose turn it is."""
        with self._lock:
            job = self._texts.pop() if self._texts else None
        if job is None or self._passes.embed(job):
            return
        with self._lock:
            cancelled = job.cancelled
            if not cancelled:
                self._texts.push(job.client, job)
        if cancelled:
            self._passes.end(job, CancelledError("the request was cancelled"))

    def _enqueue(self, queue: FairQueue[AnyJob], job: AnyJob, idle: int) -> None:
        """Let ``job`` wait, if it is not one too many."""
        with self._lock:
            if self._closing:
                raise TmacError("the server is shutting down")
            waiting = len(self._queue) + len(self._texts)
            if waiting >= self._max_queue + idle:
                raise BusyError(f"{waiting} requests are waiting; try again later")
            queue.push(job.client, job)
            self._lock.notify()

    def _end_all(self, error: Exception) -> None:
        for slot in self._slots:
            self._passes.free(slot, error)
        with self._lock:
            waiting: list[Job | EmbeddingJob] = [
                queue.pop() for queue in (self._queue, self._texts) for _ in range(len(queue))
            ]
        for job in waiting:
            self._passes.end(job, error)
