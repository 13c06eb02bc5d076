"""Quantised matrices in NumPy: codes with a scale (and an offset) per group, and round-to-nearest.

This file is the definition of the encodings; the packed bytes and the kernels follow it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.parallel import map_threads
from tmac_py.spec import LAYOUTS, Encoding, LinearSpec, OffsetKind

Search = Literal["minmax", "mse"]

MAX_BITS = 8
MAX_BCQ_BITS = 4

_CHUNK_ELEMENTS = 1 << 16
"""Weights worked on at once: a few float32 buffers of this size stay in the L2 cache."""

_MINMAX_ELEMENTS = 1 << 18
"""The same where there are two such buffers only, and little to do for each weight."""

_SHRINK: dict[int, tuple[float, int]] = {1: (0.2, 9), 2: (0.4, 9), 3: (0.5, 9), 4: (0.6, 8)}
"""bits -> (smallest fraction of the min-max range tried by "mse", number of fractions)."""
_SHRINK_WIDE = (0.85, 4)
"""The same for 5 to 8 bits, where clipping hardly ever pays."""

_TERNARY_SMALLEST = 1e-5
"""The smallest mean of |w| that BitNet divides by."""


class MatrixLike(Protocol):
    """Anything with a shape ``[m, k]`` whose row slices are float32 arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(m, k)``."""

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        """Rows ``[n, k]`` as float32."""


def count_groups(k: int, group_size: int) -> int:
    """Number of groups along k; the last one may be ragged."""
    return -(-k // group_size)


def resolve_group_size(k: int, group_size: int) -> int:
    """The group size used for ``k`` columns: -1 and anything above k mean the whole row.

    Raises ValueError for sizes that are neither a multiple of 4 nor the whole row.
    """
    if group_size == -1 or group_size >= k:
        return k
    if group_size < 4 or group_size % 4:
        raise ValueError(
            f"group_size {group_size}: a multiple of 4, or -1 for the whole row, is needed"
        )
    return group_size


@dataclass(frozen=True)
class QuantTensor:
    """One quantised matrix ``[m, k]``; see `tmac_py.spec.LinearSpec` for the meaning of the kinds.

    Raises ValueError when shapes, dtypes or code values do not fit together.
    """

    codes: NDArray[np.uint8]  # [m, k], below 2**bits
    # [m, n_groups], or [m, n_groups, bits] for "bcq"; None where the matrix has one `scale`
    scales: NDArray[np.float16] | None
    offsets: NDArray[np.float16] | None  # [m, n_groups]; None for offset_kind "none"
    bits: int
    group_size: int
    offset_kind: OffsetKind
    zero: float = 0.0
    encoding: Encoding = "uniform"
    scale: float | None = None  # float32, of the whole matrix: ternary, with group_size k
    # [k] a permutation: column j of the codes belongs to activation order[j]. None: to activation j
    order: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits {self.bits}: 1 to {MAX_BITS} are possible")
        if self.offset_kind not in get_args(OffsetKind):
            raise ValueError(f"offset_kind {self.offset_kind!r}: one of {get_args(OffsetKind)}")
        if self.codes.dtype != np.uint8 or self.codes.ndim != 2 or 0 in self.codes.shape:
            raise ValueError(
                f"codes {self.codes.dtype}{list(self.codes.shape)}: uint8 [m, k] is needed"
            )
        if resolve_group_size(self.k, self.group_size) != self.group_size:
            raise ValueError(f"group_size {self.group_size} exceeds k = {self.k}")
        if (self.offsets is None) != (self.offset_kind == "none"):
            raise ValueError(f"offset_kind {self.offset_kind!r} and offsets contradict each other")
        per_group = (self.m, self.n_groups)
        per_scale = (*per_group, self.bits) if self.encoding == "bcq" else per_group
        for name, values, wanted in (
            ("scales", self.scales, per_scale),
            ("offsets", self.offsets, per_group),
        ):
            if values is not None and (values.dtype != np.float16 or values.shape != wanted):
                raise ValueError(
                    f"{name} {values.dtype}{list(values.shape)}: float16{list(wanted)} is needed"
                )
        largest = int(self.codes.max()) if self.bits < MAX_BITS else 0
        if largest >= 1 << self.bits:
            raise ValueError(f"code {largest} does not fit in {self.bits} bits")
        if self.encoding not in get_args(Encoding):
            raise ValueError(f"encoding {self.encoding!r}: one of {get_args(Encoding)}")
        if self.encoding == "ternary":
            if (self.bits, self.offset_kind, self.zero) != (2, "none", 1):
                raise ValueError("a ternary matrix has bits 2, offset_kind 'none' and zero 1")
            if largest > 2:
                raise ValueError("code 3: a ternary matrix has codes 0, 1 and 2")
        if self.encoding == "bcq" and (
            self.bits > MAX_BCQ_BITS or (self.offset_kind, self.zero) != ("offset", 0)
        ):
            raise ValueError(
                f"a binary-coded matrix has bits 1 to {MAX_BCQ_BITS}, offset_kind 'offset', zero 0"
            )
        if (self.scale is None) == (self.scales is None):
            raise ValueError("either scales, or one scale for the whole matrix, are needed")
        if self.scale is not None:
            if self.encoding != "ternary" or self.group_size != self.k:
                raise ValueError("one scale needs a ternary matrix with group_size k")
            if not np.isfinite(self.scale) or float(np.float32(self.scale)) != self.scale:
                raise ValueError(f"scale {self.scale}: a finite float32 is needed")
        if self.order is not None:
            if self.order.dtype != np.int32 or self.order.shape != (self.k,):
                raise ValueError(
                    f"order {self.order.dtype}{list(self.order.shape)}: int32[{self.k}] is needed"
                )
            if not np.array_equal(np.sort(self.order), np.arange(self.k)):
                raise ValueError(f"order must hold each of 0 to {self.k - 1} once")

    @property
    def m(self) -> int:
        """Rows (out features)."""
        return int(self.codes.shape[0])

    @property
    def k(self) -> int:
        """Columns (in features)."""
        return int(self.codes.shape[1])

    @property
    def n_groups(self) -> int:
        """Groups per row."""
        return count_groups(self.k, self.group_size)

    @property
    def spec(self) -> LinearSpec:
        """Shape and encoding, without the data."""
        return LinearSpec(
            self.m,
            self.k,
            self.bits,
            self.group_size,
            self.offset_kind,
            float(self.zero),
            LAYOUTS[self.encoding],
            None if self.scale is None else float(self.scale),
        )

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix in float32, ``[m, k]``; column j multiplies activation j."""
        out = self._decode_planes() if self.encoding == "bcq" else self._decode()
        if self.order is None:
            return out
        ordered = np.empty_like(out)
        ordered[:, self.order] = out
        return ordered

    def _decode(self) -> NDArray[np.float32]:
        out = self.codes.astype(np.float32)
        if self.offset_kind == "zero":
            out -= self._per_column(self.offsets)
        elif self.offset_kind == "none":
            out -= np.float32(self.zero)
        out *= self._per_column(self.scales) if self.scale is None else np.float32(self.scale)
        if self.offset_kind == "offset":
            out += self._per_column(self.offsets)
        return out

    def _decode_planes(self) -> NDArray[np.float32]:
        assert self.scales is not None
        out = np.zeros((self.m, self.k), np.float32)
        for p in range(self.bits):
            scales = self._per_column(self.scales[..., p])
            out += np.where(self.codes >> p & 1, scales, -scales)
        return out + self._per_column(self.offsets)

    def _per_column(self, values: NDArray[np.float16] | None) -> NDArray[np.float32]:
        assert values is not None
        return np.repeat(values.astype(np.float32), self.group_size, axis=1)[:, : self.k]


def quantize_rtn(
    w: MatrixLike,
    *,
    bits: int,
    group_size: int,
    asym: bool = False,
    search: Search = "minmax",
    importance: NDArray[np.float32] | None = None,
) -> QuantTensor:
    """Round a float matrix ``[m, k]`` to the nearest codes, group by group.

    Codes are chosen with the scale and offset as fp16 stores them. Symmetric groups
    (``offset_kind "none"``) use codes around ``2**(bits-1)`` (0.5 for one bit), and the sign of the
    scale puts the larger side on the code that has one step more. ``asym`` stores an offset per
    group instead. ``search="mse"`` also tries shrunken ranges and keeps, per group, the smallest
    squared error, in which ``importance`` ``[k]`` (default: 1) is the weight of each column.
    ``group_size`` is a multiple of 4, or -1 for the whole row.

    Rows are worked on in chunks, several at a time, so that ``w`` may be a lazy matrix larger than
    memory. Raises ValueError for bad options, weights that are not finite, and fp16 overflow.
    """
    if len(w.shape) != 2 or 0 in w.shape:
        raise ValueError(f"shape {list(w.shape)}: a matrix [m, k] is needed")
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits {bits}: 1 to {MAX_BITS} are possible")
    if search not in get_args(Search):
        raise ValueError(f"search {search!r}: one of {get_args(Search)}")
    m, k = w.shape
    group_size = resolve_group_size(k, group_size)
    n_groups = count_groups(k, group_size)
    codes = np.empty((m, k), np.uint8)
    scales = np.empty((m, n_groups), np.float16)
    offsets = np.empty((m, n_groups), np.float16) if asym else None

    def encode(rows: slice) -> None:
        chunk = np.ascontiguousarray(w[rows], dtype=np.float32)
        for columns, groups in group_blocks(k, group_size):
            g = chunk[:, columns].reshape(chunk.shape[0], groups.stop - groups.start, -1)
            weight = None if importance is None else importance[columns].reshape(g.shape[1:])
            c, s, o = encode_groups(g, bits, asym, search, weight)
            codes[rows, columns] = c.reshape(chunk.shape[0], -1)
            scales[rows, groups] = s
            if offsets is not None:
                offsets[rows, groups] = o

    elements = _MINMAX_ELEMENTS if search == "minmax" else _CHUNK_ELEMENTS
    map_threads(encode, row_chunks(m, k, elements))
    zero = 0.0 if asym else symmetric_zero(bits)
    kind: OffsetKind = "offset" if asym else "none"
    return QuantTensor(codes, scales, offsets, bits, group_size, kind, zero)


def ternary_tensor(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16] | float,
    *,
    group_size: int | None = None,
) -> QuantTensor:
    """The matrix ``scales * (codes - 1)`` of codes 0, 1, 2 ``[m, k]``.

    ``scales`` is ``[m, n_groups]`` for groups of ``group_size`` weights (default: k), or one float
    for the whole matrix, rounded to float32.
    Raises ValueError when shapes, dtypes or code values do not fit together.
    """
    size = codes.shape[-1] if group_size is None else group_size
    if isinstance(scales, np.ndarray):
        return QuantTensor(codes, scales, None, 2, size, "none", 1.0, "ternary")
    scale = float(np.float32(scales))
    return QuantTensor(codes, None, None, 2, size, "none", 1.0, "ternary", scale)


def bcq_tensor(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
    offsets: NDArray[np.float16],
    *,
    group_size: int | None = None,
    order: NDArray[np.int32] | None = None,
) -> QuantTensor:
    """The matrix of codes ``[m, k]`` whose bits have the scales ``[m, n_groups, bits]``.

    Offsets are ``[m, n_groups]``, of groups of ``group_size`` weights (default: k); ``order`` is
    as in QuantTensor.
    Raises ValueError when shapes, dtypes or code values do not fit together.
    """
    size = codes.shape[-1] if group_size is None else group_size
    bits = scales.shape[-1]
    return QuantTensor(codes, scales, offsets, bits, size, "offset", 0.0, "bcq", order=order)


def quantize_ternary(w: MatrixLike, *, scale: float | None = None) -> QuantTensor:
    """Round a float matrix ``[m, k]`` to -1, 0 and 1 times one scale, as BitNet b1.58 does.

    The scale is the mean of ``|w|`` (Ma et al., 2024, section 2), or the one given, as float32.
    Raises ValueError for weights that are not finite, and for scales that are not positive float32.
    """
    if len(w.shape) != 2 or 0 in w.shape:
        raise ValueError(f"shape {list(w.shape)}: a matrix [m, k] is needed")
    m, k = w.shape
    rows = list(row_chunks(m, k, _CHUNK_ELEMENTS))
    if scale is None:
        sums = map_threads(lambda r: float(np.abs(w[r]).sum(dtype=np.float64)), rows)
        total = sum(sums)
        if not np.isfinite(total):
            raise ValueError("weights are not finite")
        scale = max(total / (m * k), _TERNARY_SMALLEST)
    elif not np.finfo(np.float32).tiny <= scale <= np.finfo(np.float32).max:
        raise ValueError(f"scale {scale}: a positive float32 is needed")
    scale = float(np.float32(scale))
    inverse = np.float32(1 / scale)
    codes = np.empty((m, k), np.uint8)

    def encode(rows: slice) -> None:
        trits = np.rint(np.asarray(w[rows], np.float32) * inverse)
        if not np.isfinite(trits).all():
            raise ValueError("weights are not finite")
        codes[rows] = np.clip(trits, -1, 1) + 1

    map_threads(encode, rows)
    return ternary_tensor(codes, scale)


def symmetric_zero(bits: int) -> float:
    """The code that stands for 0 in a symmetric encoding."""
    return float(1 << (bits - 1)) if bits > 1 else 0.5


def row_chunks(m: int, k: int, elements: int) -> Iterator[slice]:
    """Slices that cover m rows of k columns, about ``elements`` values each."""
    step = max(1, elements // k)
    return (slice(i, min(i + step, m)) for i in range(0, m, step))


def _fractions(bits: int, search: Search) -> list[float]:
    """Fractions of the min-max range to try, widest first."""
    if search == "minmax":
        return [1.0]
    smallest, count = _SHRINK.get(bits, _SHRINK_WIDE)
    return [float(f) for f in np.linspace(1.0, smallest, count)]


def group_blocks(k: int, group_size: int) -> Iterator[tuple[slice, slice]]:
    """(columns, groups) of the full groups, then of the ragged last one."""
    full = k // group_size
    if full:
        yield slice(0, full * group_size), slice(0, full)
    if full * group_size < k:
        yield slice(full * group_size, k), slice(full, full + 1)


def encode_groups(
    w: NDArray[np.float32],
    bits: int,
    asym: bool,
    search: Search,
    importance: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Codes [r, g, n], scales [r, g] and offsets [r, g] (symmetric: zeros) of w [r, g, n].

    See `quantize_rtn`; ``importance`` is [g, n]. Raises ValueError for weights that are not finite
    and for fp16 overflow.
    """
    fractions = _fractions(bits, search)
    shape, flat = w.shape, np.ascontiguousarray(w).reshape(-1, w.shape[2])
    low, high = (ends.reshape(shape[:2]) for ends in _core.group_ranges(flat))
    if np.isnan(low).any():
        raise ValueError("weights are not finite")
    mean = w.mean(axis=2) if asym and len(fractions) > 1 else np.zeros_like(low)
    best: tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]] | None = None
    best_error = np.empty_like(low)
    for fraction in fractions:
        f = np.float32(fraction)
        if asym:
            s, o = _asym_range(mean + f * (low - mean), mean + f * (high - mean), bits)
        else:
            s, o = _sym_range(f * low, f * high, bits)
        codes = _core.nearest_codes(
            flat,
            s.reshape(-1),
            o.reshape(-1) if asym else None,
            zero=symmetric_zero(bits),
            bits=bits,
        )
        q = codes.reshape(shape)
        if len(fractions) == 1:
            best = q, s, o
            break
        error = _squared_error(w, q, s, o, bits, asym, importance)
        if best is None:
            best, best_error = (q, s, o), error
            continue
        better = error < best_error
        best_error[better] = error[better]
        best[0][better], best[1][better], best[2][better] = q[better], s[better], o[better]
    assert best is not None
    return best


def _to_fp16(values: NDArray[np.float32], what: str) -> NDArray[np.float16]:
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{what} {np.abs(values).max():.4g} exceeds the largest fp16, 65504")
    return rounded


def _asym_range(
    low: NDArray[np.float32], high: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    scale = (high - low) / np.float32((1 << bits) - 1)
    return _to_fp16(scale, "scale"), _to_fp16(low, "offset")


def _sym_range(
    low: NDArray[np.float32], high: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """The smallest scale whose codes reach both ends; negative where the upper end is farther."""
    zero = np.float32(symmetric_zero(bits))
    below, above = zero, np.float32((1 << bits) - 1) - zero  # steps on either side of zero
    flip = high > -low
    far = np.maximum(np.where(flip, high, -low), 0)
    near = np.maximum(np.where(flip, -low, high), 0)
    scale = np.maximum(far / below, near / above)
    return _to_fp16(np.where(flip, -scale, scale), "scale"), np.zeros(low.shape, np.float16)


def _squared_error(
    w: NDArray[np.float32],
    q: NDArray[np.uint8],
    s: NDArray[np.float16],
    o: NDArray[np.float16],
    bits: int,
    asym: bool,
    importance: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    zero = np.float32(0 if asym else symmetric_zero(bits))
    d = q.astype(np.float32)
    d -= zero
    d *= s.astype(np.float32)[..., None]
    d -= w
    if asym:
        d += o.astype(np.float32)[..., None]
    error: NDArray[np.float32]
    if importance is None:
        error = np.einsum("rgn,rgn->rg", d, d)
    else:
        error = np.einsum("rgn,rgn,gn->rg", d, d, importance)
    return error
