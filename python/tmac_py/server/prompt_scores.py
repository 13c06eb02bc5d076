"""Log probabilities of the tokens of a prompt, for those who want them with the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.decoding import Ids
from tmac_py.generate import Step, Timings, Token
from tmac_py.sampling import top_logprobs
from tmac_py.tokenizer import IncrementalDecoder, Tokenizer


class PromptScores:
    """Those of one prompt, as steps.

    Args:
        prompt: ids int32 [n], n >= 1.
        n_top: alternatives to name for each token.
        tokenizer: makes the text of the steps, special tokens included but for the one that begins
            every text.

    Attributes:
        steps: one for each token so far; nothing precedes the first, whose log probability is NaN.
    """

    def __init__(self, prompt: Ids, n_top: int, tokenizer: Tokenizer) -> None:
        self._prompt = prompt
        self._n_top = n_top
        self._timings = Timings(n_prompt=len(prompt))
        self._decoder = IncrementalDecoder(tokenizer, skip_special=False, trim_space=True)
        self.steps: list[Step] = []
        first = int(prompt[0])
        text = "" if first == tokenizer.bos_id else self._decoder.push(first)
        self._add(text, first, math.nan)

    @property
    def complete(self) -> bool:
        """Whether all tokens have theirs."""
        return len(self.steps) == len(self._prompt)

    def add(self, rows: NDArray[np.float32]) -> None:
        """Take note of the logits [n, vocab] after the next n tokens of the prompt."""
        start = len(self.steps)
        for token_id, row in zip(self._prompt[start:].tolist(), rows, strict=False):
            top = top_logprobs(row, self._n_top) if self._n_top else ()
            logprob = _core.log_probability(row, token_id)
            self._add(self._decoder.push(token_id), token_id, logprob, top)

    def _add(
        self, text: str, token_id: int, logprob: float, top: Sequence[tuple[int, float]] = ()
    ) -> None:
        token = Token(text, token_id, logprob, None, self._timings)
        self.steps.append(Step(token, tuple(top)))
