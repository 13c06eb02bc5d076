"""How likely a text is to a model, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tmac_py.errors import ContextError, OptionError
from tmac_py.evaluation import Floats, ModelLogProbs, score_chunk

if TYPE_CHECKING:
    from tmac_py.model import Model


@dataclass(frozen=True, eq=False)
class Score:
    """Log probabilities of the tokens of a text, each given those before it.

    Attributes:
        ids: the tokens that are scored.
        logprobs: natural logarithm of the probability of each, float64 [n].
    """

    ids: tuple[int, ...]
    logprobs: Floats

    @property
    def total(self) -> float:
        """Logarithm of the probability of all of them together."""
        return float(self.logprobs.sum())

    @property
    def perplexity(self) -> float:
        """The exponential of the mean negative log probability."""
        return math.exp(-float(self.logprobs.mean()))


def score(
    model: Model, text: str | Sequence[int], after: str | Sequence[int] | None, kv: str
) -> Score:
    """See ``Model.score``."""
    if after is None:
        ids, first = model.check_prompt(text).tolist(), 1
    else:
        before = model.check_prompt(after).tolist()
        own = model.tokenizer.encode(text, add_special=False) if isinstance(text, str) else text
        ids, first = (
            before + (model.check_prompt(own).tolist() if np.size(own) else []),
            len(before),
        )
    if len(ids) <= first:
        raise OptionError("the text has no token to score; the first needs another before it")
    if len(ids) > model.n_ctx:
        raise ContextError(f"{len(ids)} tokens, the context holds {model.n_ctx}")
    checked = model.check_prompt(ids)
    rows = ModelLogProbs(model, len(ids), kv).blocks(0, checked, first)
    scores = score_chunk(checked, first, rows)
    return Score(tuple(ids[first:]), -np.array(scores.nll))
