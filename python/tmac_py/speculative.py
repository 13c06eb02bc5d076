"""Speculative decoding: guess the next tokens cheaply, verify all of them in one pass.

One pass over the weights costs little more for several tokens than for one (Leviathan et al., 2023,
Fast Inference from Transformers via Speculative Decoding, section 2). The model samples at every
guessed position as it would without guesses; guesses up to the first that it would not have chosen
are kept. So the text is that of plain decoding, token by token, for every seed.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, Protocol

import numpy as np

from tmac_py.decoding import CacheT, Forward, Logits, prefill
from tmac_py.sampling import Sampler

MOST_GUESSED = 15
"""Tokens guessed at once: with the one before them, as many as tables serve in one pass, which
gives each the bits that it gets alone."""


@dataclass(frozen=True)
class Guess:
    """Tokens that may come next. Some ``kind`` of guess is right more often than another."""

    tokens: list[int]
    kind: int = 0


class Drafter(Protocol):
    """Where guesses come from. For one generation."""

    @property
    def seconds_per_token(self) -> float | None:
        """What a guessed token costs; None where it is next to nothing."""

    def guess(self, history: Sequence[int], most: int) -> Guess:
        """Up to ``most`` tokens that may follow ``history``, which grows from call to call."""


class PromptLookup:
    """Guesses that what followed the last few tokens earlier follows them again.

    Saxena, 2023, Prompt Lookup Decoding. The longest run of ``sizes`` tokens that occurred before
    counts, where it did so last.
    """

    seconds_per_token = None

    def __init__(self, sizes: Sequence[int] = (5, 4, 3, 2)) -> None:
        self._sizes = tuple(sorted(sizes, reverse=True))
        self._ends: dict[tuple[int, ...], int] = {}  # of a run of tokens, the last time
        self._known = 0  # ends of runs before this one are known

    def guess(self, history: Sequence[int], most: int) -> Guess:
        """As :meth:`Drafter.guess`."""
        for end in range(self._known, len(history)):
            for size in self._sizes:
                if size <= end:
                    self._ends[tuple(history[end - size : end])] = end
        self._known = len(history)
        for size in self._sizes:
            end = self._ends.get(tuple(history[-size:]), 0)
            if end:
                period = len(history) - end  # what is guessed may itself be repeated
                return Guess([history[end + i % period] for i in range(most)], size)
        return Guess([])


class DraftModel(Generic[CacheT]):
    """Guesses what a smaller model with the same vocabulary finds most likely."""

    def __init__(self, forward: Forward[CacheT], cache: CacheT) -> None:
        """``forward`` runs the model on ``cache``, which is empty."""
        self._forward = forward
        self._cache = cache
        self._held: list[int] = []  # what the cache holds
        self._agreed = 0  # of that, certainly the beginning of the history
        self._seconds_per_token = 0.0

    @property
    def seconds_per_token(self) -> float:
        """Of the last guess."""
        return self._seconds_per_token

    def guess(self, history: Sequence[int], most: int) -> Guess:
        """As :meth:`Drafter.guess`."""
        most = min(most, self._cache.n_ctx - len(history) + 1)
        if most < 1:
            return Guess([])
        logits = self._catch_up(history)
        started = perf_counter()
        tokens = [int(logits.argmax())]
        while len(tokens) < most:
            tokens.append(int(self._run(tokens[-1:]).argmax()))
        if most > 1:
            self._seconds_per_token = (perf_counter() - started) / (most - 1)
        return Guess(tokens)

    def _catch_up(self, history: Sequence[int]) -> Logits:
        """Logits after ``history``; of what the cache holds, only the last token is run again."""
        known = self._agreed
        while known < min(len(self._held), len(history)) and self._held[known] == history[known]:
            known += 1
        known = min(known, len(history) - 1)
        self._cache.truncate(known)
        known = self._cache.pos
        del self._held[known:]
        logits = self._run(history[known:])
        self._agreed = len(history)
        return logits

    def _run(self, ids: Sequence[int]) -> Logits:
        logits = prefill(self._forward, self._cache, np.array(ids, dtype=np.int32))
        self._held += ids
        return logits


class _Record:
    """How often guesses of one kind were right; the older one is, the less it counts."""

    _FADING = 1 - 1 / 24

    def __init__(self) -> None:
        self._right, self._all = 1.0, 2.0

    @property
    def chance(self) -> float:
        return self._right / self._all

    def add(self, right: bool) -> None:
        self._right = self._right * self._FADING + right
        self._all = self._all * self._FADING + 1


class DraftLength:
    """Chooses how many tokens to guess: the number that gives most tokens a second.

    With each guess right with probability a, n guesses give 1 + a + ... + a^n tokens in a pass
    (Leviathan et al., 2023, section 3.1), which costs as much as passes of 1 + n tokens did lately.
    """

    SHARE = 0.13
    """Of the time of one token, what each further one of a pass adds before it is measured: as much
    as 2 tokens do with 2-bit weights (docs/kernels.md)."""

    LEAST_GAIN = 1.03
    """Guesses that are expected to gain less are not worth it."""

    def __init__(self) -> None:
        self._one = 0.0  # seconds of a pass of one token
        self._shares: dict[int, float] = {}  # of n further tokens, for each of them
        self._records: dict[int, _Record] = {}

    def timed(self, tokens: int, seconds: float) -> None:
        """Take note of a pass. One that was not taken for long is trusted less and less."""
        if tokens == 1:
            self._one += (seconds - self._one) / 8 if self._one else seconds
        elif self._one:
            share = max(0.0, seconds / self._one - 1) / (tokens - 1)
            old = self._shares.get(tokens - 1, share)
            self._shares[tokens - 1] = old + (share - old) / 8
        for n in self._shares:
            if n != tokens - 1:
                self._shares[n] += (self.SHARE - self._shares[n]) / 64

    def judged(self, kind: int, right: list[bool]) -> None:
        """Take note of guesses of that kind: whether the first, second, ... was right."""
        record = self._records.setdefault(kind, _Record())
        for one in right:
            record.add(one)

    def best(self, kind: int, most: int, seconds_per_token: float = 0.0) -> int:
        """How many tokens of such a guess to verify, 0 to ``most``."""
        if not self._one:
            return 0
        chance = self._records.setdefault(kind, _Record()).chance
        best, best_gain = 0, self.LEAST_GAIN
        tokens = power = 1.0
        for n in range(1, most + 1):
            power *= chance
            tokens += power
            gain = tokens / (
                1 + n * (self._shares.get(n, self.SHARE) + seconds_per_token / self._one)
            )
            if gain > best_gain:
                best, best_gain = n, gain
        return best


class Speculation:
    """Decides when to guess, and judges what was guessed. For one generation."""

    _LONGEST_PAUSE = 256

    def __init__(self, drafter: Drafter) -> None:
        self.length = DraftLength()
        self.n_guessed = self.n_right = 0
        self._drafter = drafter
        self._guess = Guess([])
        self._pause = self._left = 0  # tokens without guesses, where these cost something

    def guess(self, history: Sequence[int], most: int) -> list[int]:
        """Tokens to verify, at most ``most``."""
        cost = self._drafter.seconds_per_token
        if cost is None:
            self._guess = self._drafter.guess(history, most)
            n = self.length.best(self._guess.kind, len(self._guess.tokens))
            return self._guess.tokens[:n]
        self._guess = Guess([])
        n = self.length.best(0, most, cost)
        if n == 0 and most > 0 and self._left == 0:  # is it still as bad?
            self._pause = self._left = min(2 * self._pause + 8, self._LONGEST_PAUSE)
            n = 1
        if n == 0:
            self._left = max(0, self._left - 1)
        else:
            self._guess = self._drafter.guess(history, n)
        return self._guess.tokens[:n]

    def judge(self, verified: int, tokens: list[int]) -> None:
        """``tokens`` came; of the guess, ``verified`` tokens had been tried."""
        right = [ours == theirs for ours, theirs in zip(self._guess.tokens, tokens, strict=False)]
        self.length.judged(self._guess.kind, right)
        self.n_guessed += verified
        self.n_right += sum(right[:verified])


def speculate(
    forward: Forward[CacheT],
    cache: CacheT,
    logits: Logits,
    sampler: Sampler,
    history: list[int],
    speculation: Speculation,
    max_tokens: int,
) -> Generator[tuple[int, float], None, None]:
    """As :func:`tmac_py.decoding.decode`, up to ``max_tokens`` tokens; the same ones.

    When the generator is closed, the cache holds ``history`` but its last token.
    """
    before = cache.pos - len(history)
    last = len(history) + max_tokens
    try:
        token, logprob = sampler.sample(logits, history)
        history.append(token)
        yield token, logprob
        while len(history) < last:
            room = min(last - len(history), cache.n_ctx - cache.pos) - 1
            guessed = speculation.guess(history, min(room, MOST_GUESSED))
            started = perf_counter()
            rows = forward(np.array([history[-1], *guessed], dtype=np.int32), cache, "all")
            speculation.length.timed(1 + len(guessed), perf_counter() - started)
            known = len(history)
            for row, expected in zip(rows, [*guessed, None], strict=True):
                token, logprob = sampler.sample(row, history)
                history.append(token)
                yield token, logprob
                if token != expected:
                    break
            speculation.judge(len(guessed), history[known:])
            cache.truncate(before + len(history) - 1)
    finally:
        cache.truncate(min(cache.pos, before + len(history) - 1))
