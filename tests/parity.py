"""Comparison of logits with those of another program."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tmac_py import Model


def logits_in_pieces(model: Model, ids: NDArray[np.int32], n_tokens: int) -> NDArray[np.float32]:
    """Logits at every position, [n, vocab], from that many tokens at a time."""
    cache = model.new_cache()
    parts = np.split(ids, range(n_tokens, len(ids), n_tokens))
    return np.concatenate([model.forward(part, cache, "all") for part in parts])


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest difference at each position, [n]."""
    assert ours.shape == theirs.shape
    largest: NDArray[np.float32] = np.abs(ours - theirs).max(axis=1)
    return largest


def assert_top1_agrees(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], bound: float, decided: float
) -> None:
    """Where the reference's margin is beyond what errors of ``bound`` can turn; such positions are
    a part of at least ``decided``."""
    best = np.sort(theirs, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * bound
    assert clear.mean() >= decided
    assert np.array_equal(ours.argmax(axis=1)[clear], theirs.argmax(axis=1)[clear])
