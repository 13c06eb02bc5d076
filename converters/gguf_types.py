"""GGUF block formats that are affine per group, or ternary: bytes to codes, scales and offsets.

Every function gets blocks ``uint8 [n, bytes]`` and returns codes ``uint8 [n, block]``, scales
``float32 [n, groups]`` and offsets ``float32 [n, groups]`` or None. A weight is
``scale * (code - zero)`` or ``scale * code + offset``. Q2_K to Q6_K store a group's scale as a
product of two numbers, Q8_K and old Q8_1 files store it as fp32; it is rounded to fp16 once, all
other values are exact.

Blocks are those of ggml-common.h in ggml; I2_S is that of bitnet.cpp, ggml-bitnet-mad.cpp, for x86.
Other types have codebooks; the gguf package dequantises them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.parallel import map_threads
from tmac_py.quant import QuantTensor, row_chunks, ternary_tensor
from tmac_py.spec import OffsetKind

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Decoded = tuple[Bytes, Floats, Floats | None]

_CHUNK_ELEMENTS = 1 << 19
"""Weights that one thread decodes at once; the temporaries are a few times as large."""


@dataclass(frozen=True)
class BlockType:
    """One GGUF type: ``block`` weights in ``nbytes`` bytes, a scale per ``group_size`` weights."""

    block: int
    nbytes: int
    bits: int
    group_size: int
    zero: float  # of types without offsets
    decode: Callable[[Bytes], Decoded]
    ternary: bool = False
    offsets: bool = False


def decode_tensor(
    raw: Bytes, k: int, kind: BlockType, *, rows: NDArray[np.intp] | None = None
) -> QuantTensor:
    """The matrix ``[m, k]`` of ``raw`` ``[m, bytes of a row]``; ``rows`` reorders the rows.

    Raises ValueError when a scale or an offset is not finite or exceeds fp16, and for ternary codes
    that are not 0, 1 or 2.
    """
    m = raw.shape[0]
    codes = np.empty((m, k), np.uint8)
    scales = np.empty((m, k // kind.group_size), np.float16)
    offsets = np.empty_like(scales) if kind.offsets else None
    n_blocks = k // kind.block

    def decode(part: slice) -> None:
        chunk = np.ascontiguousarray(raw[part if rows is None else rows[part]])
        n = chunk.shape[0]
        with np.errstate(invalid="ignore"):  # infinity times 0 is found below
            c, s, o = kind.decode(chunk.reshape(n * n_blocks, -1))
        codes[part] = c.reshape(n, k)
        scales[part] = _to_fp16(s, "scale").reshape(n, -1)
        if offsets is not None:
            assert o is not None
            offsets[part] = _to_fp16(o, "offset").reshape(n, -1)

    map_threads(decode, row_chunks(m, k, _CHUNK_ELEMENTS))
    if kind.ternary:
        return _ternary(codes, scales)
    offset_kind: OffsetKind = "none" if offsets is None else "offset"
    return QuantTensor(codes, scales, offsets, kind.bits, kind.group_size, offset_kind, kind.zero)


def _ternary(codes: Bytes, scales: NDArray[np.float16]) -> QuantTensor:
    """One scale for the matrix where all are equal, but for blocks of zeros, whose scale is 0."""
    group_size = codes.shape[1] // scales.shape[1]
    used = scales != 0
    scale = scales.flat[used.argmax()]
    if (scales[used] == scale).all():
        blocks = codes.reshape(*scales.shape, group_size)
        if not used.any() or used.all() or (blocks[~used] == 1).all():
            return ternary_tensor(codes, float(scale))
    return ternary_tensor(codes, scales, group_size=group_size)


def decode_i2_s(
    raw: Bytes, shape: tuple[int, int], *, rows: NDArray[np.intp] | None = None
) -> QuantTensor:
    """The ternary matrix ``[m, k]`` of an I2_S tensor, uint8 ``[m * k / 4 + 32]``.

    128 weights along k are 32 bytes; byte ``i`` holds weights i, i + 32, i + 64 and i + 96, the
    first in its highest bits. One fp32 scale for the matrix follows. Raises ValueError for another
    k, for codes that are not 0, 1 or 2, and for a scale that is negative or not finite.
    """
    m, k = shape
    if k % _I2_S_BLOCK:
        raise ValueError(f"I2_S with k = {k}, which is not a multiple of {_I2_S_BLOCK}")
    scale = float(raw[m * k // 4 :][:4].view("<f4")[0])
    if not 0 <= scale < np.inf:
        raise ValueError(f"scale {scale:.6g} of I2_S is not a finite positive number")
    packed = raw[: m * k // 4].reshape(m, -1)
    codes = np.empty((m, k), np.uint8)

    def decode(part: slice) -> None:
        chunk = np.ascontiguousarray(packed[part if rows is None else rows[part]])
        fields = _fields(chunk, 32, 2).reshape(chunk.shape[0], -1, 4, 32)
        codes[part] = fields[:, :, ::-1].reshape(-1, k)

    map_threads(decode, row_chunks(m, k, _CHUNK_ELEMENTS))
    if int(codes.max()) > 2:
        raise ValueError(
            "code 3 in I2_S: not the layout that bitnet.cpp writes on x86, and the file does not "
            "say which it is"
        )
    return ternary_tensor(codes, scale)


@dataclass(frozen=True)
class CodebookMatrix:
    """A matrix ``[m, k]`` in a type of the gguf package, dequantised as its rows are sliced.

    ``raw`` is ``[m, bytes of a row]``; ``rows`` reorders the rows.
    """

    raw: Bytes
    shape: tuple[int, ...]
    kind: str
    rows: NDArray[np.intp] | None = None

    def __getitem__(self, rows: slice, /) -> Floats:
        raw = np.ascontiguousarray(self.raw[rows if self.rows is None else self.rows[rows]])
        with np.errstate(over="ignore", invalid="ignore"):
            return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[self.kind])


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


def _single(blocks: Bytes, start: int) -> Floats:
    """The fp32 number at byte ``start`` of each block, [n, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 4]).view("<f4")


def _fields(packed: Bytes, run: int, bits: int) -> Bytes:
    """Unpack bit fields [n, bytes] -> [n, bytes * 8 / bits].

    Each run of ``run`` bytes holds 8 / bits runs of values: first all lowest fields, then the next.
    """
    return _core.unpack_runs(packed, run, bits)


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


def _q8_1(b: Bytes) -> Decoded:
    """A scale, the scaled sum of the codes, 32 int8 codes; numbers of two bytes, once of four."""
    if b.shape[1] == 36:
        return b[:, 4:] ^ np.uint8(0x80), _half(b, 0), None
    return b[:, 8:] ^ np.uint8(0x80), _single(b, 0), None


def _q8_k(b: Bytes) -> Decoded:
    """An fp32 scale, 256 int8 codes, 16 sums of codes."""
    return b[:, 4:260] ^ np.uint8(0x80), _single(b, 0), None


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


def _trits(packed: Bytes, count: int) -> Bytes:
    """Unpack base-3 digits [n, bytes] -> [n, count * bytes]: all first ones, then the next.

    A byte is the fraction whose digits the trits are, in 256ths, rounded up.
    """
    powers = np.array([3**i for i in range(count)], np.uint8).reshape(1, -1, 1)
    fractions: Bytes = packed[:, None, :] * powers  # modulo 256
    digits = (fractions.astype(np.uint16) * 3) >> 8
    return digits.astype(np.uint8).reshape(packed.shape[0], -1)


def _tq1_0(b: Bytes) -> Decoded:
    """32 and 16 bytes of 5 trits, 4 bytes of 4 trits, d."""
    parts = [_trits(b[:, :32], 5), _trits(b[:, 32:48], 5), _trits(b[:, 48:52], 4)]
    return np.hstack(parts), _half(b, 52), None


def _tq2_0(b: Bytes) -> Decoded:
    """64 bytes of codes, d."""
    return _fields(b[:, :64], 32, 2), _half(b, 64), None


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, 4, 32, 8.0, _q4_0),
    "Q4_1": BlockType(32, 20, 4, 32, 0.0, _q4_1, offsets=True),
    "Q5_0": BlockType(32, 22, 5, 32, 16.0, _q5_0),
    "Q5_1": BlockType(32, 24, 5, 32, 0.0, _q5_1, offsets=True),
    "Q8_0": BlockType(32, 34, 8, 32, 128.0, _q8_0),
    "Q8_1": BlockType(32, 36, 8, 32, 128.0, _q8_1),
    "Q2_K": BlockType(256, 84, 2, 16, 0.0, _q2_k, offsets=True),
    "Q3_K": BlockType(256, 110, 3, 16, 4.0, _q3_k),
    "Q4_K": BlockType(256, 144, 4, 32, 0.0, _q4_k, offsets=True),
    "Q5_K": BlockType(256, 176, 5, 32, 0.0, _q5_k, offsets=True),
    "Q6_K": BlockType(256, 210, 6, 16, 32.0, _q6_k),
    "Q8_K": BlockType(256, 292, 8, 256, 128.0, _q8_k),
    "TQ1_0": BlockType(256, 54, 2, 256, 1.0, _tq1_0, ternary=True),
    "TQ2_0": BlockType(256, 66, 2, 256, 1.0, _tq2_0, ternary=True),
}
"""The types read with their codes kept, by the name GGUF gives them; I2_S is one more."""

_I2_S_BLOCK = 128

CODEBOOK_TYPES = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "MXFP4",
    "NVFP4",
)
"""Types whose codes stand for numbers that are not evenly spaced: only dequantised."""

FLOAT_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
"""Float types and how their bytes are viewed (bfloat16 as uint16)."""
