"""Answers to several prompts at once: one pass over the weights decodes a token of each."""

from __future__ import annotations

import reprlib
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from tmac_py.cancelling import CancelledStep, cancellable, check_cancelled
from tmac_py.checks import check_whole
from tmac_py.decoding import SAME_BITS, Logits, prefill
from tmac_py.errors import ContextError, OptionError
from tmac_py.generate import AnswerText, Result, Timings, Token
from tmac_py.options import AnswerOptions, given_options
from tmac_py.plans import Plan, fix_seed, make_plan, needed_context

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tmac_py import _core
    from tmac_py.model import Model


def generate_batch(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    *,
    batch_size: int,
    n_ctx: int,
    kv: str,
    **options: Unpack[AnswerOptions],
) -> list[Result]:
    """See ``Model.generate_batch``."""
    given_options(options, AnswerOptions)
    check_whole("batch_size", batch_size, 1, SAME_BITS)
    check_whole("n_ctx", n_ctx, 0, error=ContextError)
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | np.ndarray):
        raise OptionError(f"prompts is {reprlib.repr(prompts)}; allowed: a list of prompts")
    waiting: deque[tuple[int, Plan, int]] = deque()
    seeds = []
    for i, prompt in enumerate(prompts):
        own = options.copy()
        seeds.append(fix_seed(own))
        ids = model.check_prompt(prompt)
        size = n_ctx or needed_context(model, len(ids), options.get("max_tokens"))
        waiting.append((i, make_plan(model, ids, size, own), size))
    tokens: list[list[Token]] = [[] for _ in prompts]
    active: list[_Sequence] = []
    with suppress(CancelledStep):
        while waiting or active:
            while waiting and len(active) < batch_size:
                i, plan, size = waiting.popleft()
                active.append(_Sequence(model, plan, model.new_cache(size, kv), tokens[i]))
            active = [sequence for sequence in active if not sequence.ended]
            if active:
                check_cancelled(options.get("cancel"))
                _decode(model, active)
    return [Result(own, seed) for own, seed in zip(tokens, seeds, strict=True)]


def _decode(model: Model, active: Sequence[_Sequence]) -> None:
    """One more token for each."""
    started = perf_counter()
    rows = model.forward_batch(
        [[sequence.text[-1]] for sequence in active], [sequence.cache for sequence in active]
    )
    for sequence, row in zip(active, rows, strict=True):
        sequence.push(row, started)


class _Sequence:
    """One answer under way: its prompt is computed, and the first token chosen.

    Attributes:
        cache: holds ``text`` but its last token.
        text: ids of prompt and answer so far.
        ended: whether the answer is complete.
    """

    def __init__(self, model: Model, plan: Plan, cache: _core.KvCache, tokens: list[Token]) -> None:
        """Tokens are appended to ``tokens``. Raises CancelledStep."""
        self.cache = cache
        self.text: list[int] = plan.prompt.tolist()
        self.ended = False
        self._n_prompt = len(self.text)
        self._sampler = plan.sampler()
        self._answer = AnswerText(plan.decoder, plan.eos_ids, plan.stop, plan.room)
        self._tokens = tokens
        self._prompt_seconds = self._gen_seconds = 0.0
        started = perf_counter()
        self.push(prefill(cancellable(model.forward, plan.cancel), cache, plan.prompt), started)

    def push(self, logits: Logits, started: float) -> None:
        """Choose the next token by ``logits`` float32 [vocab], computed since ``started``."""
        token_id, logprob = self._sampler.sample(logits, self.text)
        self.text.append(token_id)
        text, reason = self._answer.push(token_id)
        seconds = perf_counter() - started
        if self._tokens:
            self._gen_seconds += seconds
        else:
            self._prompt_seconds = seconds
        timings = Timings(
            n_prompt=self._n_prompt,
            prompt_seconds=self._prompt_seconds,
            n_gen=len(self._tokens) + 1,
            gen_seconds=self._gen_seconds,
        )
        self._tokens.append(Token(text, token_id, logprob, reason, timings))
        self.ended = reason is not None
