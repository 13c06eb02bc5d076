"""Unsigned integers of a few bits that are packed into 32-bit words."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.quant import row_chunks

_WORD_BITS = 32
_BYTE_BITS = 8
_CHUNK_FIELDS = 1 << 18
"""Fields worked on at once: words and fields stay in the cache."""


def unpack_fields(
    words: NDArray[Any], bits: int, count: int, *, straddle: bool = True
) -> NDArray[np.uint8]:
    """The first ``count`` fields in each row of int32 words: uint8 ``[n, count]``, lowest first.

    Field i begins at bit ``i * bits`` of the words in a row (``straddle``: it may end in the next
    word), or else every word holds ``32 // bits`` fields and wastes the rest.
    """
    words = np.ascontiguousarray(words)
    units: NDArray[Any]
    if _BYTE_BITS % bits == 0:  # little-endian bytes hold whole fields, and are quicker to split
        units, n_units, n_fields = words.view(np.uint8), 1, _BYTE_BITS // bits
    elif straddle:
        units, n_units, n_fields = words.view(np.uint32), bits, _WORD_BITS
    else:
        units, n_units, n_fields = words.view(np.uint32), 1, _WORD_BITS // bits
    unit_bits = units.dtype.itemsize * 8
    periods = -(-count // n_fields)
    if missing := max(0, periods * n_units - units.shape[1]):
        units = np.pad(units, ((0, 0), (0, missing)))
    kind = units.dtype.type
    fields = np.empty((len(units), periods * n_fields), np.uint8)
    for rows in row_chunks(*fields.shape, _CHUNK_FIELDS):
        block = units[rows, : periods * n_units]
        for i in range(n_fields):
            unit, shift = divmod(i * bits, unit_bits)
            values = block[:, unit::n_units] >> kind(shift)
            if shift + bits > unit_bits:
                values |= block[:, unit + 1 :: n_units] << kind(unit_bits - shift)
            values &= kind((1 << bits) - 1)
            fields[rows, i::n_fields] = values
    return fields if fields.shape[1] == count else np.ascontiguousarray(fields[:, :count])
