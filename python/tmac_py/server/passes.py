"""Passes over the weights: parts of prompts, next tokens of answers, texts to embed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import numpy as np

from tmac_py.decoding import Ids, Logits
from tmac_py.pool import thread_pool
from tmac_py.sampling import sample_each
from tmac_py.server.embedding_job import EmbeddingJob
from tmac_py.server.jobs import CancelledError, Job
from tmac_py.server.slots import Slot
from tmac_py.speculative import MOST_GUESSED

if TYPE_CHECKING:
    from tmac_py.model import Model


@dataclass
class Counters:
    """What the engine has done since it was made; seconds are those of the core's calls.

    ``n_decode`` passes were made for the ``decode_tokens`` that followed the first of each answer;
    ``n_busy`` adds up the answers that took part in each. Texts to embed count as prompts.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    n_decode: int = 0
    n_busy: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Passes:
    """Computes what the engine decides on, and tells the clients.

    Args:
        model: what computes.
        chunk: tokens in which prompts are computed.
        n_ctx: tokens that a slot has room for.

    Attributes:
        counters: what was done so far.
    """

    def __init__(self, model: Model, chunk: int, n_ctx: int) -> None:
        self._model = model
        self._chunk = chunk
        self._n_ctx = n_ctx
        self._pool = thread_pool(model.threads)
        self.counters = Counters()

    def read(self, slot: Slot, job: Job, part: Ids) -> None:
        """Compute a part of a prompt; after the last one choose the first token of the answer."""
        scores = job.scores if job.scores is not None and not job.scores.complete else None
        started = perf_counter()
        try:
            wanted: Literal["last", "all"] = "last" if scores is None else "all"
            rows = self._model.forward(part, slot.cache, wanted)
            self._count_prompt(len(part), perf_counter() - started)
            slot.grow(part)
            if scores is not None:
                scores.add(rows)
                if scores.complete:  # as without scores the last part gives the last logits only
                    slot.rewind_to_chunk((len(job.text) - 1) // self._chunk * self._chunk)
                return
        except Exception as error:
            self.free(slot, error)
            return
        if len(slot.held) == len(job.text):
            self._sample(slot, rows)

    def decode(self, slots: Sequence[Slot]) -> None:
        """Compute the next token of several answers.

        Where that fails, each is tried alone, so that an error stays with the request it is of.
        """
        parts = [slot.todo(slot.job, 1) for slot in slots if slot.job is not None]
        started = perf_counter()
        try:
            rows = self._model.forward_batch(parts, [slot.cache for slot in slots])
        except Exception as error:
            if len(slots) == 1:
                self.free(slots[0], error)
                return
            for slot in slots:
                self.decode([slot])
            return
        self._count_decode(len(parts), len(parts), perf_counter() - started)
        for slot, ids in zip(slots, parts, strict=True):
            slot.grow(ids)
        self._sample_each(slots, rows)

    def decode_alone(self, slot: Slot, job: Job) -> None:
        """As :meth:`decode` for one answer while there is no other: several tokens, if guesses are
        right.
        """
        speculation, known = job.speculation, len(job.text)
        most = min(MOST_GUESSED, job.n_left - 1, self._n_ctx - known)
        guessed = speculation.guess(job.text, most)
        started = perf_counter()
        try:
            ids = np.array([job.text[-1], *guessed], dtype=np.int32)
            rows = self._model.forward(ids, slot.cache, "all")
        except Exception as error:
            self.free(slot, error)
            return
        seconds = perf_counter() - started
        speculation.length.timed(len(ids), seconds)
        slot.grow(ids)
        for row, expected in zip(rows, [*guessed, None], strict=True):
            if job.cancelled or self._sample(slot, row) != expected:
                break
        slot.rewind(min(len(slot.held), len(job.text) - 1))
        tokens = job.text[known:]
        speculation.judge(len(guessed), tokens)
        self._count_decode(1, len(tokens), seconds)

    def embed(self, job: EmbeddingJob) -> bool:
        """Compute a pass of texts; False if there is more to do."""
        started = perf_counter()
        try:
            n_tokens = job.work.step()
        except Exception as error:
            self.end(job, error)
            return True
        self._count_prompt(n_tokens, perf_counter() - started)
        if not job.work.complete:
            return False
        self.counters.finished += 1
        job.tell(job.work.vectors)
        return True

    def end(self, job: Job | EmbeddingJob, error: Exception) -> None:
        """End ``job`` before it is complete."""
        if isinstance(error, CancelledError):
            self.counters.cancelled += 1
        else:
            self.counters.failed += 1
        job.tell(error)

    def free(self, slot: Slot, error: Exception) -> None:
        """End the slot's job before its answer is complete."""
        job, slot.job, slot.leader = slot.job, None, None
        if job is not None:
            self.end(job, error)

    def _sample(self, slot: Slot, row: Logits) -> int | None:
        """Choose the next token of an answer; None if there is none after it."""
        [token] = self._sample_each([slot], [row])
        return token

    def _sample_each(self, slots: Sequence[Slot], rows: Sequence[Logits]) -> list[int | None]:
        """The same for several answers. All are chosen before the first client is told."""
        jobs = [slot.job for slot in slots if slot.job is not None]
        chosen = sample_each(
            [job.request.sampler for job in jobs], rows, [job.text for job in jobs], self._pool
        )
        return [
            self._push(slot, job, row, one)
            for slot, job, row, one in zip(slots, jobs, rows, chosen, strict=True)
        ]

    def _push(
        self, slot: Slot, job: Job, row: Logits, chosen: tuple[int, float] | Exception
    ) -> int | None:
        """Tell the client of a token, or why there is none."""
        if job.cancelled:
            return None
        if isinstance(chosen, Exception):
            self.free(slot, chosen)
            return None
        try:
            step = job.push(*chosen, row)
        except Exception as error:
            self.free(slot, error)
            return None
        ended = step.token.finish_reason is not None
        if ended:
            self.counters.finished += 1
            slot.job = None
        job.tell(step)
        return None if ended else step.token.id

    def _count_prompt(self, n_tokens: int, seconds: float) -> None:
        self.counters.prompt_tokens += n_tokens
        self.counters.prompt_seconds += seconds

    def _count_decode(self, n_answers: int, n_tokens: int, seconds: float) -> None:
        counters = self.counters
        counters.decode_tokens += n_tokens
        counters.decode_seconds += seconds
        counters.n_decode += 1
        counters.n_busy += n_answers
