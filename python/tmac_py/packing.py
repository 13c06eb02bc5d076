"""From a quantised matrix to packed bytes, and from those to a matrix of the core."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.lutheader import ALIGNMENT, ROW_TILE, packed_nbytes
from tmac_py.parallel import map_threads
from tmac_py.quant import QuantTensor
from tmac_py.spec import LinearSpec

_CHUNK_ELEMENTS = 1 << 20
"""Weights that one thread packs at once."""


def pack(q: QuantTensor) -> NDArray[np.uint8]:
    """Codes, scales and offsets in the layout of ``q.spec``: uint8 ``[nbytes]``.

    ``q.order`` is not part of it.
    """
    packed = np.empty(packed_nbytes(q.spec), np.uint8)
    n_tiles = -(-q.m // ROW_TILE)
    tile_bytes = (len(packed) - (0 if q.scale is None else ALIGNMENT)) // n_tiles
    step = max(1, _CHUNK_ELEMENTS // (q.k * ROW_TILE))

    def fill(first: int) -> None:
        tiles = slice(first, min(first + step, n_tiles))
        _pack_rows(
            q,
            slice(tiles.start * ROW_TILE, tiles.stop * ROW_TILE),
            packed[tiles.start * tile_bytes : tiles.stop * tile_bytes],
        )

    map_threads(fill, range(0, n_tiles, step))
    packed[n_tiles * tile_bytes :] = 0
    return packed


def _pack_rows(q: QuantTensor, rows: slice, tiles: NDArray[np.uint8]) -> None:
    _core.pack(
        q.codes[rows],
        None if q.scales is None else q.scales[rows],
        None if q.offsets is None else q.offsets[rows],
        bits=q.bits,
        group_size=q.group_size,
        offset_kind=q.offset_kind,
        encoding=q.encoding,
        scale=q.scale,
        tiles=tiles,
    )


def unpack_rows(
    packed: NDArray[np.uint8],
    spec: LinearSpec,
    rows: slice,
    *,
    order: NDArray[np.int32] | None = None,
) -> QuantTensor:
    """Rows ``[rows.start, rows.stop)`` of a packed matrix, as they were before ``pack``.

    Reads no more than the tiles that hold them, but a matrix with one scale as a whole. ValueError
    where bytes and ``spec`` do not fit together.
    """
    first, last = rows.start // ROW_TILE * ROW_TILE, -(-rows.stop // ROW_TILE) * ROW_TILE
    if spec.scale is not None:  # such a matrix has an end of its own
        first, last = 0, -(-spec.m // ROW_TILE) * ROW_TILE
    else:
        n_tiles = -(-spec.m // ROW_TILE)
        tile_bytes = len(packed) // n_tiles
        packed = packed[first // ROW_TILE * tile_bytes : last // ROW_TILE * tile_bytes]
    codes, scales, offsets = _core.unpack(
        packed,
        m=min(last, spec.m) - first,
        k=spec.k,
        bits=spec.bits,
        group_size=spec.group_size,
        offset_kind=spec.offset_kind,
        encoding=spec.encoding,
        scale=spec.scale,
    )
    wanted = slice(rows.start - first, rows.stop - first)
    return QuantTensor(
        codes=codes[wanted],
        scales=None if scales is None else scales[wanted],
        offsets=None if offsets is None else offsets[wanted],
        bits=spec.bits,
        group_size=spec.group_size,
        offset_kind=spec.offset_kind,
        zero=spec.zero,
        encoding=spec.encoding,
        scale=spec.scale,
        order=order,
    )


def open_linear(
    packed: NDArray[np.uint8], spec: LinearSpec, order: NDArray[np.int32] | None = None
) -> _core.Linear:
    """The core's view of ``packed``, which it keeps alive and does not copy.

    ``order`` is as in QuantTensor; it is copied. Raises ValueError where bytes, ``spec`` and
    ``order`` do not fit together.
    """
    return _core.Linear(
        packed,
        m=spec.m,
        k=spec.k,
        bits=spec.bits,
        group_size=spec.group_size,
        offset_kind=spec.offset_kind,
        zero=spec.zero,
        encoding=spec.encoding,
        scale=spec.scale,
        order=order,
    )
