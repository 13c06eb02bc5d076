"""One answer on its way to the user: its tokens, statistics line and JSON object."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

from tmac_py.generate import Timings, Token


@dataclass
class Answer:
    """What one generation has brought so far; ``n_prompt`` is the length of its prompt."""

    n_prompt: int
    n_prefilled: int = 0
    started: float = field(default_factory=perf_counter)
    prefill_seconds: float = 0.0
    tokens: list[Token] = field(default_factory=list)
    interrupted: bool = False

    def prefilled(self, done: int, total: int) -> None:  # noqa: ARG002 - the signature of progress
        """Note that ``done`` tokens of the prompt are processed."""
        self.n_prefilled = done
        self.prefill_seconds = perf_counter() - self.started

    def collect(self, stream: Iterable[Token], show: Callable[[str], None] | None) -> None:
        """Take the tokens of ``stream`` and show their text, up to its end or Ctrl-C."""
        try:
            for token in stream:
                self.tokens.append(token)
                if token.text and show is not None:
                    show(token.text)
        except KeyboardInterrupt:
            self.interrupted = True

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join([token.text for token in self.tokens])

    @property
    def timings(self) -> Timings:
        """Up to the last token, or how far prefill came."""
        if self.tokens:
            return self.tokens[-1].timings
        return Timings(n_prompt=self.n_prefilled, prompt_seconds=self.prefill_seconds)

    def statistics(self) -> str:
        """One line: counts and tokens per second of prefill and decode."""
        timings = self.timings
        computed = timings.n_prompt - timings.n_cached
        count = f"{computed} tokens"
        if not self.tokens and computed < self.n_prompt:
            count = f"{computed} of {self.n_prompt} tokens"
        elif timings.n_cached:
            count += f" after {timings.n_cached} known ones"
        parts = [f"prefill {count}, {timings.prompt_tps:.1f} tok/s"]
        decode = f"decode {timings.n_gen} token{'s' * (timings.n_gen != 1)}"
        if timings.n_gen > 1:
            decode += f", {timings.gen_tps:.1f} tok/s"
        parts.append(decode)
        if self.interrupted:
            parts.append("interrupted")
        return " · ".join(parts)

    def to_json(self, model: str, prompt_ids: list[int], seed: int) -> dict[str, Any]:
        """The object that --json prints; durations in seconds."""
        timings = self.timings
        reason = self.tokens[-1].finish_reason if self.tokens else None
        return {
            "text": self.text,
            "ids": [token.id for token in self.tokens],
            "prompt_ids": prompt_ids,
            "finish_reason": "interrupted" if self.interrupted else reason,
            "timings": {
                "n_prompt": timings.n_prompt,
                "n_cached": timings.n_cached,
                "prompt_seconds": timings.prompt_seconds,
                "prompt_tps": timings.prompt_tps,
                "n_gen": timings.n_gen,
                "gen_seconds": timings.gen_seconds,
                "gen_tps": timings.gen_tps,
            },
            "model": model,
            "seed": seed,
        }
