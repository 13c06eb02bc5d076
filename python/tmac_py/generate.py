"""The loop over tokens: text, stop strings, timings."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from tmac_py.decoding import CacheT, Forward, Ids, Progress, decode, prefill
from tmac_py.errors import OptionError
from tmac_py.sampling import Sampler
from tmac_py.speculative import Drafter, Speculation, speculate
from tmac_py.tokenizer import IncrementalDecoder

FinishReason = Literal["stop", "length", "cancelled"]
"""Why an answer ended: an end token or stop string; ``max_tokens`` or the context reached; or
before its end, by the option ``cancel``, which only a Result says."""


@dataclass(frozen=True)
class Timings:
    """Counts and durations of one generation, the caller's own time between tokens left out.

    ``n_cached`` of the prompt's tokens were held already. ``prompt_seconds`` ends with the first
    generated token, which prefill yields; ``gen_seconds`` is the time of the other ``n_gen - 1``.
    """

    n_prompt: int = 0
    n_cached: int = 0
    prompt_seconds: float = 0.0
    n_gen: int = 0
    gen_seconds: float = 0.0

    @property
    def prompt_tps(self) -> float:
        """Computed prompt tokens per second."""
        computed = self.n_prompt - self.n_cached
        return computed / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def gen_tps(self) -> float:
        """Decoded tokens per second; 0 while there is only the one token of prefill."""
        return (self.n_gen - 1) / self.gen_seconds if self.gen_seconds > 0 else 0.0


@dataclass(frozen=True)
class Token:
    """One generated token and the text it completed.

    Attributes:
        text: whole characters only; empty while bytes of a character are missing, while the text
            may still become a stop string, and for an end token.
        id: token id.
        logprob: natural logarithm of its probability under the model, before sampling changed it.
        finish_reason: set on the last token, else None.
        timings: up to and including this token.
    """

    text: str
    id: int
    logprob: float
    finish_reason: FinishReason | None
    timings: Timings

    @property
    def n_prompt(self) -> int:
        """Prompt tokens."""
        return self.timings.n_prompt

    @property
    def n_gen(self) -> int:
        """Tokens generated so far, this one included."""
        return self.timings.n_gen

    @property
    def prompt_tps(self) -> float:
        """Prompt tokens per second."""
        return self.timings.prompt_tps

    @property
    def gen_tps(self) -> float:
        """Decoded tokens per second so far."""
        return self.timings.gen_tps


@dataclass(frozen=True)
class Step:
    """One token of an answer, with the likeliest tokens in its place (id, log probability)."""

    token: Token
    top: tuple[tuple[int, float], ...] = ()


class Result(str):
    """A whole answer: the text, as a ``str``, with what is known about it.

    Attributes:
        ids: every generated token, an end token or the tokens of a stop string included.
        logprobs: one per id.
        finish_reason: "stop", "length", or "cancelled" for what came before it was.
        timings: counts and durations.
        seed: gives the same answer again, with the same model, prompt and parameters.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    timings: Timings
    seed: int

    def __new__(cls, tokens: Sequence[Token], seed: int) -> Result:
        """Put the tokens of one generation together."""
        self = super().__new__(cls, "".join([token.text for token in tokens]))
        self.ids = tuple(token.id for token in tokens)
        self.logprobs = tuple(token.logprob for token in tokens)
        reason = tokens[-1].finish_reason if tokens else None
        self.finish_reason = reason or "cancelled"
        self.timings = tokens[-1].timings if tokens else Timings()
        self.seed = seed
        return self

    def __getnewargs__(self) -> tuple[list[Token], int]:  # type: ignore[override]
        texts = [str(self), *[""] * (len(self.ids) - 1)][: len(self.ids)]
        rows = zip(texts, self.ids, self.logprobs, strict=True)
        return [Token(*row, self.finish_reason, self.timings) for row in rows], self.seed

    @property
    def text(self) -> str:
        """The answer as a plain ``str``."""
        return str(self)


class StopFinder:
    """Cuts a stream of text before the first stop string, wherever it is split.

    Text that may still turn out to begin a stop string is held back. Of several stop strings the
    one that is complete first counts, so the cut does not depend on how the text arrives.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be shown now; sets ``found`` when a stop string is complete."""
        if not self._stop or self.found:
            return "" if self.found else text
        text = self._held + text
        hits = [(text.find(s) + len(s), -len(s)) for s in self._stop if s in text]
        if hits:
            self.found, self._held = True, ""
            end, negative_length = min(hits)
            return text[: end + negative_length]
        held = max(overlap(text, s) for s in self._stop)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class AnswerText:
    """Turns the tokens of one answer into text, one at a time, and finds where it ends.

    Args:
        decoder: turns ids into text.
        eos_ids: tokens that end the answer; their text is not shown.
        stop: strings that end the answer and are not shown.
        max_tokens: at least 1.
    """

    def __init__(
        self,
        decoder: IncrementalDecoder,
        eos_ids: Collection[int],
        stop: Sequence[str],
        max_tokens: int,
    ) -> None:
        self._decoder = decoder
        self._eos_ids = eos_ids
        self._finder = StopFinder(stop)
        self._left = max_tokens

    def push(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text that may be shown now, and why the answer ends here if it does."""
        self._left -= 1
        finder, ended = self._finder, token_id in self._eos_ids
        text = "" if ended else finder.push(self._decoder.push(token_id))
        if finder.found:
            return text, "stop"
        if not ended and self._left > 0:
            return text, None
        text += finder.push(self._decoder.flush())
        text += finder.flush()
        return text, "stop" if ended or finder.found else "length"


def stream_tokens(
    forward: Forward[CacheT],
    cache: CacheT,
    prompt: Ids,
    *,
    decoder: IncrementalDecoder,
    sampler: Sampler,
    eos_ids: Collection[int],
    max_tokens: int,
    before: Sequence[int] = (),
    stop: Sequence[str] = (),
    drafter: Drafter | None = None,
    progress: Progress | None = None,
) -> Generator[Token, None, None]:
    """Generate up to ``max_tokens`` tokens after ``prompt``.

    Afterwards the cache holds the prompt and every generated token but the last. The generator may
    be closed at any token. ``progress(done, total)`` is called after each chunk of the prompt.

    Args:
        forward: one step of the model.
        cache: where the prompt goes; it must have room for prompt and answer.
        prompt: ids int32 [n], n >= 1.
        decoder: turns ids into text.
        sampler: chooses tokens.
        eos_ids: tokens that end the answer; their text is not shown.
        max_tokens: at least 1.
        before: what the cache holds of the same text already.
        stop: strings that end the answer and are not shown.
        drafter: where guesses of the next tokens come from; None: one token at a time.
        progress: called during prefill.
    """
    started = perf_counter()
    logits = prefill(forward, cache, prompt, progress)
    history: list[int] = [*before, *prompt.tolist()]
    n_prompt = len(history)
    if drafter is None:
        tokens = decode(forward, cache, logits, sampler, history)
    else:
        speculation = Speculation(drafter)
        tokens = speculate(forward, cache, logits, sampler, history, speculation, max_tokens)
    answer = AnswerText(decoder, eos_ids, stop, max_tokens)
    prompt_seconds = gen_seconds = 0.0
    with closing(tokens):
        for n_gen, (token_id, logprob) in enumerate(tokens, start=1):
            text, reason = answer.push(token_id)
            seconds = perf_counter() - started
            if n_gen == 1:
                prompt_seconds = seconds
            else:
                gen_seconds += seconds
            timings = Timings(n_prompt, len(before), prompt_seconds, n_gen, gen_seconds)
            yield Token(text, token_id, logprob, reason, timings)
            if reason:
                return
            started = perf_counter()


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """One or several stop strings as a tuple; OptionError for one that is empty or no text."""
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence):
        raise OptionError(f"stop is {stop!r}; allowed: a text or a sequence of texts")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise OptionError(f"stop is {string!r}; allowed: texts of at least one character")
    return tuple(strings)
