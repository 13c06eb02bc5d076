"""Unsigned integers of a few bits that are packed into 32-bit words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORD_BITS = 32


def unpack_fields(
    words: NDArray[Any], bits: int, count: int, *, axis: int, straddle: bool = True
) -> NDArray[np.uint8]:
    """The first ``count`` fields along ``axis`` of int32 words ``[n, m]``, lowest bits first.

    Field i begins at bit ``i * bits`` of the words in a row (``straddle``: it may end in the next
    word), or else every word holds ``32 // bits`` fields and wastes the rest.
    """
    if _WORD_BITS % bits == 0 or not straddle:
        n_words, n_fields = 1, _WORD_BITS // bits
    else:
        n_words, n_fields = bits, _WORD_BITS
    rows = np.moveaxis(np.asarray(words).view(np.uint32), axis, 0)
    periods = -(-count // n_fields)
    rows = np.pad(rows, [(0, max(0, periods * n_words - len(rows))), (0, 0)])
    shape = [rows.shape[1]] * 2
    shape[axis] = periods * n_fields
    fields = np.empty(shape, np.uint8)
    out = np.moveaxis(fields, axis, 0)
    for i in range(n_fields):
        word, shift = divmod(i * bits, _WORD_BITS)
        values = rows[word : periods * n_words : n_words] >> np.uint32(shift)
        if shift + bits > _WORD_BITS:
            values |= rows[word + 1 : periods * n_words : n_words] << np.uint32(_WORD_BITS - shift)
        values &= np.uint32((1 << bits) - 1)
        out[i::n_fields] = values
    return fields[:count] if axis == 0 else fields[:, :count]
