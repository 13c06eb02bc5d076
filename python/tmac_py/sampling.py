"""From the logits of one position to the next token, in NumPy.

The order is llama.cpp's: penalties, top-k, top-p, min-p, temperature. top-p and min-p therefore
look at the model's own probabilities, and temperature only decides among the tokens they leave.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tmac_py.checks import check_real, check_whole
from tmac_py.errors import TmacError

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]

_GROUPS = 64
"""Rows of the grid as which ``_top_k`` looks at the scores."""


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
        if self.seed is not None:
            check_whole("seed", self.seed, 0, note=", or None for a random one")

    @property
    def has_penalties(self) -> bool:
        """True when a penalty changes logits at all."""
        changed = (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)
        return changed and self.repeat_last_n != 0


def new_seed() -> int:
    """A random seed of 32 bits."""
    return secrets.randbits(32)


class Sampler:
    """Chooses tokens one after another. Holds the random state: one instance for one generation.

    Attributes:
        params: the parameters.
        seed: the seed in use, drawn when ``params.seed`` is None.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = new_seed() if params.seed is None else params.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: Logits, history: Sequence[int] = ()) -> tuple[int, float]:
        """The next token.

        Args:
            logits: float32 [vocab], not changed; -inf forbids a token.
            history: ids of prompt and answer so far, oldest first, for the penalties.

        Returns:
            The id and its log probability under the model's own logits (before penalties and
            temperature).

        Raises:
            TmacError: there is NaN or +inf among the logits, or no token is allowed.
        """
        best = int(logits.argmax())
        peak = float(logits[best])  # argmax stops at a NaN, so this one value shows them all
        if not math.isfinite(peak):
            raise TmacError(
                f"the model returned no usable logits (token {best} has {peak}); "
                "the model file may hold values that are not finite"
            )
        params = self.params
        scores = _penalised(logits, history, params) if params.has_penalties else logits
        if params.temperature == 0.0:
            chosen = int(scores.argmax())
        else:
            chosen = self._draw(*_candidates(scores, params))
        total = float(np.exp(logits - np.float32(peak)).sum())
        return chosen, float(logits[chosen]) - peak - math.log(total)

    def _draw(self, ids: Ids, scores: Logits) -> int:
        """One of ``ids``, by the softmax of ``scores`` at the temperature."""
        with np.errstate(over="ignore"):  # a tiny temperature makes every other token impossible
            exponents = (scores - scores.max()).astype(np.float64) / self.params.temperature
        cumulative = np.cumsum(np.exp(exponents))
        at = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(at), len(ids) - 1)])


def _penalised(logits: Logits, history: Sequence[int], params: SamplingParams) -> Logits:
    """A copy of the logits with the penalties for the tokens of ``history`` taken off."""
    window = history if params.repeat_last_n < 0 else history[-params.repeat_last_n :]
    ids, counts = np.unique(np.asarray(window, dtype=np.intp), return_counts=True)
    scores = np.array(logits)
    seen = scores[ids]
    factor = np.float32(params.repeat_penalty)
    seen = np.where(seen > 0, seen / factor, seen * factor)
    taken = counts * params.frequency_penalty + params.presence_penalty
    scores[ids] = seen - taken.astype(np.float32)
    return scores


def _candidates(scores: Logits, params: SamplingParams) -> tuple[Ids, Logits]:
    """Ids that top-k, top-p and min-p leave, with their scores; the most likely is always one.

    Each of the three keeps some number of the most likely tokens, so they may be applied in any
    order, as long as top-p counts its share of all that top-k left.
    """
    n = len(scores)
    ids = _top_k(scores, params.top_k or n)
    kept = scores[ids] if len(ids) < n else scores
    peak = kept.max()
    total = float(np.exp(kept - peak).sum(dtype=np.float64)) if params.top_p < 1.0 else 0.0
    if params.min_p > 0.0:
        likely = np.flatnonzero(kept >= peak + np.float32(math.log(params.min_p)))
        ids, kept = ids[likely], kept[likely]
    if params.top_p < 1.0:
        nucleus = _top_p(kept, params.top_p * total)
        ids, kept = ids[nucleus], kept[nucleus]
    return ids, kept


def _top_p(scores: Logits, mass: float) -> Ids:
    """The fewest of the largest scores whose ``exp(score - max)`` sum up to ``mass``, else all.

    Few usually do, so sorting all of a vocabulary is the last thing tried.
    """
    n = len(scores)
    for count in (512, 4096, n):
        ids = _top_k(scores, count)
        ids = ids[np.argsort(-scores[ids], kind="stable")]
        kept = scores[ids].astype(np.float64)
        cumulative = np.cumsum(np.exp(kept - kept[0]))
        if cumulative[-1] >= mass or count >= n:
            break
    return ids[: int(np.searchsorted(cumulative, mass)) + 1]


def _top_k(scores: Logits, k: int) -> Ids:
    """Ids of the ``k`` largest scores in rising order of id; equal scores count from the lowest id.

    With the scores as a grid, k columns reach the k-th largest column maximum: it bounds the k-th
    largest score from below, only a handful lies above, and nothing needs to be partitioned.
    """
    n = len(scores)
    if k >= n:
        return np.arange(n, dtype=np.intp)
    columns = n // _GROUPS
    if k <= columns:
        maxima = scores[: columns * _GROUPS].reshape(_GROUPS, columns).max(axis=0)
        bound = np.partition(maxima, columns - k)[columns - k]
    else:
        bound = np.partition(scores, n - k)[n - k]
    ids = np.flatnonzero(scores >= bound)
    order = np.argsort(-scores[ids], kind="stable")[:k]
    return np.sort(ids[order])
