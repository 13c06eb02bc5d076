"""Unsigned integers of a few bits that are packed into 32-bit words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.parallel import map_threads
from tmac_py.quant import row_chunks

_WORD_BITS = 32
_CHUNK_FIELDS = 1 << 20
"""Fields that one thread works on at once."""


def unpack_fields(
    words: NDArray[Any],
    bits: int,
    count: int,
    *,
    straddle: bool = True,
    order: NDArray[np.int32] | None = None,
) -> NDArray[np.uint8]:
    """The first ``count`` fields in each row of int32 words: uint8 ``[n, count]``, lowest first.

    Field i begins at bit ``i * bits`` of the words in a row (``straddle``: it may end in the next
    word), or else every word holds ``32 // bits`` fields and wastes the rest. Column j of the
    result is field ``order[j]``, if there is an order.
    """
    fields = np.empty((len(words), count), np.uint8)

    def unpack(rows: slice) -> None:
        if straddle or _WORD_BITS % bits == 0:
            _core.unpack_streams(words[rows], fields[rows], bits=bits, order=order)
            return
        found = _split_words(np.ascontiguousarray(words[rows]), bits)[:, :count]
        if order is None:
            fields[rows] = found
        else:
            np.take(found, order, axis=1, out=fields[rows], mode="clip")

    map_threads(unpack, row_chunks(*fields.shape, _CHUNK_FIELDS))
    return fields


def _split_words(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """All fields of words that hold whole fields only."""
    words = words.view(np.uint32)
    per_word = _WORD_BITS // bits
    fields = np.empty((*words.shape, per_word), np.uint8)
    for i in range(per_word):
        fields[..., i] = words >> np.uint32(i * bits) & np.uint32((1 << bits) - 1)
    return fields.reshape(len(words), -1)
