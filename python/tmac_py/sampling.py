"""From the logits of one position to the next token.

The order is llama.cpp's: bias, penalties, top-k, top-p, min-p, temperature. top-p and min-p
therefore look at the model's own probabilities, and temperature only decides among the tokens they
leave. The arithmetic is the core's (csrc/model/sampler.h).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.checks import check_real, check_whole
from tmac_py.errors import OptionError, TmacError
from tmac_py.seeding import pcg64_state

Logits = NDArray[np.float32]
Ids = NDArray[np.int32]
Shares = NDArray[np.float64]

LogitsProcessor = Callable[[Ids, Logits], Logits | None]
"""Called before every token with the ids of prompt and answer so far, int32 [n], and the logits,
float32 [vocab], which it may change in place; or it returns others of that shape."""


_MAX_ID = 2**31 - 1
_MAX_BIAS = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose the next token; the defaults are llama.cpp's. Immutable, checked on creation.

    Attributes:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: choose among so many of the most likely tokens; 0 = all.
        top_p: choose among the fewest tokens whose probabilities reach it; 1 = all.
        min_p: drop tokens less likely than this share of the most likely one; 0 = none.
        repeat_penalty: divides positive and multiplies negative logits of recent tokens; 1 = off.
        repeat_last_n: how many tokens of prompt and answer the three penalties look back at (not
            at those a given KV cache already held); 0 = none, -1 = all.
        presence_penalty: subtracted once from the logit of every recent token; 0 = off.
        frequency_penalty: subtracted for each time a recent token occurs; 0 = off.
        logit_bias: added to the logits of these token ids; -inf forbids a token.
        seed: the same seed gives the same tokens; None draws one.

    Raises:
        OptionError: a value is not allowed; the text names it and what is.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None

    def __post_init__(self) -> None:
        inf = math.inf
        check_real("temperature", self.temperature, 0, inf, "0 (greedy) and more")
        check_whole("top_k", self.top_k, 0, note=" (0 = all tokens)")
        check_real("top_p", self.top_p, 0, 1, "above 0 and at most 1 (off)", above_low=True)
        check_real("min_p", self.min_p, 0, 1, "0 (off) to 1")
        penalty = self.repeat_penalty
        check_real("repeat_penalty", penalty, 0, inf, "above 0 (1 = off)", above_low=True)
        check_whole("repeat_last_n", self.repeat_last_n, -1, note=" (0 = off, -1 = all tokens)")
        for name in ("presence_penalty", "frequency_penalty"):
            check_real(name, getattr(self, name), -inf, inf, "a finite number (0 = off)")
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.seed is not None:
            check_whole("seed", self.seed, 0, note=", or None for a random one")

    @property
    def has_penalties(self) -> bool:
        """True when a penalty changes logits at all."""
        changed = (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
        return changed and self.repeat_last_n != 0


def _checked_bias(bias: Mapping[int, float]) -> dict[int, float]:
    """A copy with plain numbers."""
    if not isinstance(bias, Mapping):
        raise OptionError(f"logit_bias is {bias!r}; allowed: a mapping of token ids to numbers")
    checked = {}
    for token, value in bias.items():
        token_id = check_whole("a token id of logit_bias", token, 0, _MAX_ID)
        if value != -math.inf:
            allowed = "a finite number, or -inf to forbid the token"
            check_real(f"logit_bias of token {token_id}", value, -_MAX_BIAS, _MAX_BIAS, allowed)
        checked[token_id] = float(value)
    return checked


def check_processors(
    processors: LogitsProcessor | Sequence[LogitsProcessor],
) -> tuple[LogitsProcessor, ...]:
    """One or several processors as a tuple; OptionError for what cannot be called."""
    if callable(processors):
        return (processors,)
    if not isinstance(processors, Sequence) or not all(map(callable, processors)):
        raise OptionError(
            f"logits_processor is {processors!r}; allowed: a function or a sequence of functions"
        )
    return tuple(processors)


def new_seed() -> int:
    """A random seed of 32 bits."""
    return int.from_bytes(os.urandom(4), "little")


class Sampler:
    """Chooses tokens one after another. Holds the random state: one instance for one generation.

    The same seed, logits and history give the same token on every machine.

    Attributes:
        params: the parameters.
        seed: the seed in use, drawn when ``params.seed`` is None.
    """

    def __init__(self, params: SamplingParams, processors: Iterable[LogitsProcessor] = ()) -> None:
        """With functions that change the logits of every position before all else, in order."""
        self.params = params
        self.seed = new_seed() if params.seed is None else params.seed
        self._processors = tuple(processors)
        state, increment = pcg64_state(self.seed)
        self._core = _core.Sampler(
            temperature=params.temperature,
            top_k=min(params.top_k, _MAX_ID),
            top_p=params.top_p,
            min_p=params.min_p,
            repeat_penalty=params.repeat_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=list(params.logit_bias.items()),
            state=divmod(state, 1 << 64),
            increment=divmod(increment, 1 << 64),
        )

    def sample(self, logits: Logits, history: Sequence[int] = ()) -> tuple[int, float]:
        """The next token.

        Args:
            logits: float32 [vocab], not changed; -inf forbids a token.
            history: ids of prompt and answer so far, oldest first, for penalties and processors.

        Returns:
            The id and its log probability under the model's own logits (before processors, bias,
            penalties and temperature).

        Raises:
            OptionError: a processor returns no logits, or a bias is outside the vocabulary.
            TmacError: there is NaN or +inf among the logits, or no token is allowed.
        """
        scores = self._processed(logits, history)
        try:
            token, logprob = self._core.sample(scores, self._recent(history))
            if scores is not logits:
                logprob = _core.log_probability(logits, token)
        except ValueError as error:
            raise TmacError(str(error)) from error
        return token, logprob

    def probabilities(self, logits: Logits, history: Sequence[int] = ()) -> tuple[Ids, Shares]:
        """What :meth:`sample` draws from: the tokens that may come next, and how likely each is.

        Arguments and errors as :meth:`sample`.

        Returns:
            ids int32 [n] and probabilities float64 [n], which add up to 1; with temperature 0 the
            one most likely token.
        """
        scores = self._processed(logits, history)
        try:
            return self._core.distribution(scores, self._recent(history))
        except ValueError as error:
            raise TmacError(str(error)) from error

    def sample_from(self, ids: Ids, shares: Shares) -> int:
        """One of ``ids`` [n], by ``shares`` float64 [n], which may have any sum above 0.

        Raises:
            TmacError: a share is negative or not finite, or all are 0.
        """
        try:
            return int(ids[self._core.draw(shares)])
        except ValueError as error:
            raise TmacError(str(error)) from error

    def random(self) -> float:
        """The next random number in [0, 1)."""
        return self._core.uniform()

    def _recent(self, history: Sequence[int]) -> Sequence[int]:
        """The ids that the penalties are for."""
        if not self.params.has_penalties:
            return ()
        window = self.params.repeat_last_n
        return history if window < 0 else history[-window:]

    def _processed(self, logits: Logits, history: Sequence[int]) -> Logits:
        """``logits`` after the processors, which work on a copy."""
        if not self._processors:
            return logits
        ids = np.array(history, dtype=np.int32)
        scores: Logits = logits.copy()
        for processor in self._processors:
            result = processor(ids, scores)
            if result is None:
                continue
            array = np.asarray(result)
            if array.shape != logits.shape or array.dtype.kind != "f":
                raise OptionError(
                    f"logits_processor returned {array.dtype} {list(array.shape)}; allowed: "
                    f"logits float32 {list(logits.shape)}, or None after changing its argument"
                )
            scores = np.ascontiguousarray(array, dtype=np.float32)
        return scores


def sample_each(
    samplers: Sequence[Sampler],
    rows: Sequence[Logits],
    histories: Sequence[Sequence[int]],
    pool: _core.ThreadPool,
) -> list[tuple[int, float] | Exception]:
    """The next tokens of several sequences, whose rows the threads of ``pool`` share.

    Args:
        samplers: of each sequence its own.
        rows: logits of each, as for :meth:`Sampler.sample`.
        histories: ids of each so far.
        pool: the threads.

    Returns:
        for each sequence what ``sample`` would return, or the exception that it would raise.

    Raises:
        OptionError: two sequences have the same sampler.
    """
    wanted = [
        (sampler._core, row, sampler._recent(history))
        for sampler, row, history in zip(samplers, rows, histories, strict=True)
        if not sampler._processors
    ]
    try:
        found = iter(_core.sample_rows(wanted, pool))
    except ValueError as error:
        raise OptionError(str(error)) from error
    results: list[tuple[int, float] | Exception] = []
    for sampler, row, history in zip(samplers, rows, histories, strict=True):
        if not sampler._processors:
            token = next(found)
            results.append(TmacError(token) if isinstance(token, str) else token)
            continue
        try:
            results.append(sampler.sample(row, history))
        except Exception as error:
            results.append(error)
    return results


def top_logprobs(logits: Logits, n: int) -> list[tuple[int, float]]:
    """The ``n`` most likely tokens of one position, with their log probabilities.

    Args:
        logits: float32 [vocab].
        n: how many; at most the vocabulary.

    Returns:
        (id, log probability), the most likely first, of equal ones the lowest id.

    Raises:
        OptionError: ``n`` is below 1.
        TmacError: there is NaN or +inf among the logits.
    """
    check_whole("n", n, 1)
    try:
        return _core.most_likely(logits, n)
    except ValueError as error:
        raise TmacError(str(error)) from error
