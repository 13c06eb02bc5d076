"""From a seed to the state of PCG64, as NumPy's ``PCG64(seed)`` starts it.

``numpy.random`` itself brings OpenSSL along: 6 MB and 10 ms of every process that answers a prompt.
M. E. O'Neill, PCG (2014) and "Simple portable C++ seed entropy" (2015); the hash is that of
numpy.random.SeedSequence.
"""

from __future__ import annotations

_POOL = 4
_WORD = 0xFFFFFFFF
_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
_MASK = (1 << 128) - 1


def pcg64_state(seed: int) -> tuple[int, int]:
    """State and increment, 128 bits each, of a generator with this ``seed`` (0 or more)."""
    pool, hashed = _mixed_pool(seed), _Hash(0x8B51F9DD, 0x58F38DED)
    words = [hashed(pool[i % _POOL]) for i in range(8)]
    start, sequence = (
        sum(word << shift for word, shift in zip(words[i : i + 4], (64, 96, 0, 32), strict=True))
        for i in (0, 4)
    )
    increment = (sequence << 1 | 1) & _MASK
    state = (increment + start) & _MASK
    return (state * _MULTIPLIER + increment) & _MASK, increment


def _mixed_pool(seed: int) -> list[int]:
    """Four words, to each of which every word of the seed contributes."""
    entropy = [seed >> shift & _WORD for shift in range(0, max(seed.bit_length(), 1), 32)]
    hashed = _Hash(0x43B0D7E5, 0x931E8875)
    padded = entropy + [0] * (_POOL - len(entropy))
    pool = [hashed(word) for word in padded[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mix(pool[target], hashed(pool[source]))
    for word in padded[_POOL:]:
        for target in range(_POOL):
            pool[target] = _mix(pool[target], hashed(word))
    return pool


class _Hash:
    """A hash of words one after another, each with factors of its own."""

    def __init__(self, factor: int, ratio: int) -> None:
        self._factor = factor
        self._ratio = ratio

    def __call__(self, word: int) -> int:
        word ^= self._factor
        self._factor = self._factor * self._ratio & _WORD
        word = word * self._factor & _WORD
        return word ^ word >> 16


def _mix(x: int, y: int) -> int:
    word = (0xCA01F9DD * x - 0x4973F715 * y) & _WORD
    return word ^ word >> 16
