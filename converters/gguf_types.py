"""GGUF block formats that are affine per group: raw bytes to codes, scales and offsets.

Every function gets blocks ``uint8 [n, bytes]`` and returns codes ``uint8 [n, block]``, scales
``float32 [n, groups]`` and offsets ``float32 [n, groups]`` or None. A weight is
``scale * (code - zero)`` or ``scale * code + offset``. The K formats store a group's scale as a
product of two numbers; it is rounded to fp16 once, all other values are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.quant import QuantTensor, row_chunks
from tmac_py.spec import OffsetKind

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Decoded = tuple[Bytes, Floats, Floats | None]

_CHUNK_ELEMENTS = 1 << 20
"""Weights decoded at once; the temporaries are a few times as large."""


@dataclass(frozen=True)
class BlockType:
    """One GGUF type: ``block`` weights in ``nbytes`` bytes, a scale per ``group_size`` weights."""

    block: int
    nbytes: int
    bits: int
    group_size: int
    zero: float  # of types without offsets
    decode: Callable[[Bytes], Decoded]


def decode_tensor(
    raw: Bytes, kind: BlockType, *, rows: NDArray[np.intp] | None = None
) -> QuantTensor:
    """Codes, scales and offsets of ``raw`` ``[m, bytes per row]``; ``rows`` reorders the rows.

    Raises ValueError when a scale or an offset is not finite or exceeds fp16.
    """
    m, row_bytes = raw.shape
    k = row_bytes // kind.nbytes * kind.block
    codes = np.empty((m, k), np.uint8)
    scales = np.empty((m, k // kind.group_size), np.float16)
    offsets: NDArray[np.float16] | None = None
    for part in row_chunks(m, k, _CHUNK_ELEMENTS):
        chunk = np.ascontiguousarray(raw[part if rows is None else rows[part]])
        n = chunk.shape[0]
        c, s, o = kind.decode(chunk.reshape(-1, kind.nbytes))
        codes[part] = c.reshape(n, k)
        scales[part] = _to_fp16(s, "scale").reshape(n, -1)
        if o is not None:
            if offsets is None:
                offsets = np.empty_like(scales)
            offsets[part] = _to_fp16(o, "offset").reshape(n, -1)
    offset_kind: OffsetKind = "none" if offsets is None else "offset"
    return QuantTensor(codes, scales, offsets, kind.bits, kind.group_size, offset_kind, kind.zero)


def _to_fp16(values: Floats, what: str) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = values.astype(np.float16)
    bad = ~np.isfinite(rounded)
    if bad.any():
        raise ValueError(f"{what} {values[bad][0]:.6g} is not a finite fp16 number")
    return rounded


def _half(blocks: Bytes, start: int) -> Floats:
    """The fp16 number at byte ``start`` of each block, [n, 1]."""
    two = np.ascontiguousarray(blocks[:, start : start + 2])
    return two.view(np.float16).astype(np.float32)


def _fields(packed: Bytes, run: int, bits: int) -> Bytes:
    """Unpack bit fields [n, bytes] -> [n, bytes * 8 / bits].

    Each run of ``run`` bytes holds 8 / bits runs of values: first all lowest fields, then the next.
    """
    n = packed.shape[0]
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(1, 1, -1, 1)
    values: Bytes = packed.reshape(n, -1, 1, run) >> shifts
    values &= np.uint8((1 << bits) - 1)
    return values.reshape(n, -1)


def _fifth_bits(blocks: Bytes, start: int) -> Bytes:
    """32 single bits of 4 bytes as 0 or 16, [n, 32]."""
    bits: Bytes = np.unpackbits(blocks[:, start : start + 4], axis=1, bitorder="little")
    bits <<= np.uint8(4)
    return bits


def _q4_0(b: Bytes) -> Decoded:
    return _fields(b[:, 2:], 16, 4), _half(b, 0), None


def _q4_1(b: Bytes) -> Decoded:
    return _fields(b[:, 4:], 16, 4), _half(b, 0), _half(b, 2)


def _q5_0(b: Bytes) -> Decoded:
    return _fields(b[:, 6:], 16, 4) | _fifth_bits(b, 2), _half(b, 0), None


def _q5_1(b: Bytes) -> Decoded:
    return _fields(b[:, 8:], 16, 4) | _fifth_bits(b, 4), _half(b, 0), _half(b, 2)


def _q8_0(b: Bytes) -> Decoded:
    return b[:, 2:] ^ np.uint8(0x80), _half(b, 0), None  # int8 + 128


def _q2_k(b: Bytes) -> Decoded:
    """16 bytes of 4-bit scales and minima, 64 bytes of codes, d, dmin."""
    scale = (b[:, :16] & np.uint8(15)).astype(np.float32)
    minimum = (b[:, :16] >> np.uint8(4)).astype(np.float32)
    return _fields(b[:, 16:80], 32, 2), _half(b, 80) * scale, -(_half(b, 82) * minimum)


def _q3_k(b: Bytes) -> Decoded:
    """32 bytes of third bits, 64 bytes of low bits, 12 bytes of 6-bit scales less 32, d."""
    high = _fields(b[:, :32], 32, 1) << np.uint8(2)  # a set bit means "4 more"
    low_scale = _fields(b[:, 96:104], 8, 4)
    high_scale = _fields(b[:, 104:108], 4, 2) << np.uint8(4)
    scale = (low_scale | high_scale).astype(np.float32) - np.float32(32)
    return _fields(b[:, 32:96], 32, 2) | high, _half(b, 108) * scale, None


def _scales_and_minima(packed: Bytes) -> tuple[Floats, Floats]:
    """Eight 6-bit scales and minima from the 12 bytes that Q4_K and Q5_K share, each [n, 8].

    Bytes 0-3 and 4-7 hold four scales and four minima, their top bits the top bits of the other
    four, whose low nibbles stand in bytes 8-11.
    """
    first, second, nibbles = packed[:, :4], packed[:, 4:8], packed[:, 8:]

    def joined(six: Bytes, low: Bytes) -> Floats:
        high = (six >> np.uint8(2)) & np.uint8(0x30)
        return np.hstack([six & np.uint8(0x3F), low | high]).astype(np.float32)

    return joined(first, nibbles & np.uint8(15)), joined(second, nibbles >> np.uint8(4))


def _q4_k(b: Bytes) -> Decoded:
    """D, dmin, 12 bytes of scales and minima, 128 bytes of codes."""
    scale, minimum = _scales_and_minima(b[:, 4:16])
    return _fields(b[:, 16:], 32, 4), _half(b, 0) * scale, -(_half(b, 2) * minimum)


def _q5_k(b: Bytes) -> Decoded:
    """As Q4_K, with 32 bytes of fifth bits before the codes."""
    scale, minimum = _scales_and_minima(b[:, 4:16])
    codes = _fields(b[:, 48:], 32, 4) | _fields(b[:, 16:48], 32, 1) << np.uint8(4)
    return codes, _half(b, 0) * scale, -(_half(b, 2) * minimum)


def _q6_k(b: Bytes) -> Decoded:
    """128 bytes of low bits, 64 bytes of high bits, 16 int8 scales, d."""
    codes = _fields(b[:, :128], 64, 4) | _fields(b[:, 128:192], 32, 2) << np.uint8(4)
    scale = np.ascontiguousarray(b[:, 192:208]).view(np.int8).astype(np.float32)
    return codes, _half(b, 208) * scale, None


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 4, 32, 8.0, _q4_0),
    "Q4_1": BlockType(32, 20, 4, 32, 0.0, _q4_1),
    "Q5_0": BlockType(32, 22, 5, 32, 16.0, _q5_0),
    "Q5_1": BlockType(32, 24, 5, 32, 0.0, _q5_1),
    "Q8_0": BlockType(32, 34, 8, 32, 128.0, _q8_0),
    "Q2_K": BlockType(256, 84, 2, 16, 0.0, _q2_k),
    "Q3_K": BlockType(256, 110, 3, 16, 4.0, _q3_k),
    "Q4_K": BlockType(256, 144, 4, 32, 0.0, _q4_k),
    "Q5_K": BlockType(256, 176, 5, 32, 0.0, _q5_k),
    "Q6_K": BlockType(256, 210, 6, 16, 32.0, _q6_k),
}
"""The types read with their codes kept, by the name GGUF gives them."""

FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Float types and how their bytes are viewed (bfloat16 as uint16)."""
