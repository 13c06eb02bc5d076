"""What every quantiser is given and what they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tmac_py.parallel import map_threads
from tmac_py.quant import (
    MatrixLike,
    QuantTensor,
    count_groups,
    resolve_group_size,
    row_chunks,
    symmetric_zero,
)

NOT_FINITE = "activations of the calibration text are not finite"
"""Error of a model that overflows float32."""

_HESSIAN_ROWS = 128
"""Rows of a Hessian computed at once."""


@dataclass(frozen=True)
class Settings:
    """How one matrix is quantised: 1 to 8 ``bits``, an offset per group if ``asym``.

    ``act_order``: columns may get another order, for methods that round one after the other.
    """

    bits: int
    group_size: int
    asym: bool
    act_order: bool = False


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a matrix ``[m, k]`` is multiplied with: ``x`` float32 ``[tokens, k]``."""

    x: NDArray[np.float32]

    def hessian(self) -> NDArray[np.float32]:
        """``x^T x / tokens``, ``[k, k]``: half the Hessian of the mean squared output error."""
        k = self.x.shape[1]
        result = np.empty((k, k), np.float32)

        def fill(start: int) -> None:
            rows = slice(start, start + _HESSIAN_ROWS)
            part = self.x.T[rows] @ self.x[:, start:]
            part /= np.float32(len(self.x))
            result[start:, rows] = part.T
            result[rows, start:] = part

        map_threads(fill, range(0, k, _HESSIAN_ROWS))
        return result

    @cached_property
    def mean_square(self) -> NDArray[np.float32]:
        """Mean of ``x**2``, ``[k]``: the Hessian's diagonal. ValueError if it is not finite."""
        result = np.asarray(np.square(self.x).mean(axis=0, dtype=np.float64), np.float32)
        if not np.isfinite(result).all():
            raise ValueError(NOT_FINITE)
        return result

    @cached_property
    def mean_abs(self) -> NDArray[np.float32]:
        """Mean of ``|x|``, ``[k]``."""
        return np.asarray(np.abs(self.x).mean(axis=0, dtype=np.float64), np.float32)

    def sample(self, tokens: int) -> NDArray[np.float32]:
        """At most ``tokens`` rows of ``x``, evenly spaced."""
        step = -(-len(self.x) // tokens)
        return np.ascontiguousarray(self.x[::step])


class Quantizer(Protocol):
    """One method; ``inputs`` is None for methods that are not calibrated."""

    def __call__(
        self, matrix: MatrixLike, settings: Settings, inputs: Inputs | None
    ) -> QuantTensor:
        """Quantise ``[m, k]``; ValueError for weights that are not finite, and fp16 overflow."""


class Encoded(NamedTuple):
    """Rows of a quantised matrix, as QuantTensor holds them."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    offsets: NDArray[np.float16] | None


def encode_rows(
    matrix: MatrixLike,
    group_size: int,
    elements: int,
    encode: Callable[[NDArray[np.float32], int], Encoded],
) -> Encoded:
    """``encode(rows [r, k], group size)`` for chunks of about ``elements`` weights, on all cores.

    Raises ValueError for weights that are not finite, and for a bad group size.
    """
    m, k = matrix.shape
    size = resolve_group_size(k, group_size)

    def piece(rows: slice) -> Encoded:
        w = np.ascontiguousarray(matrix[rows], dtype=np.float32)
        if not np.isfinite(w).all():
            raise ValueError("weights are not finite")
        return encode(w, size)

    pieces = map_threads(piece, row_chunks(m, k, elements))
    offsets = [piece.offsets for piece in pieces if piece.offsets is not None]
    return Encoded(
        np.concatenate([piece.codes for piece in pieces]),
        np.concatenate([piece.scales for piece in pieces]),
        np.concatenate(offsets) if offsets else None,
    )


def uniform_tensor(
    encoded: Encoded, bits: int, group_size: int, order: NDArray[np.int32] | None = None
) -> QuantTensor:
    """Evenly spaced codes with an offset per group, or symmetric ones without.

    ``order`` is as in QuantTensor.
    """
    codes, scales, offsets = encoded
    size = resolve_group_size(codes.shape[1], group_size)
    if offsets is None:
        zero = symmetric_zero(bits)
        return QuantTensor(codes, scales, None, bits, size, "none", zero, order=order)
    return QuantTensor(codes, scales, offsets, bits, size, "offset", order=order)


def to_fp16(values: NDArray[np.float32], what: str) -> NDArray[np.float16]:
    """Round to fp16; ValueError for numbers beyond it."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{what} {np.abs(values).max():.4g} exceeds the largest fp16, 65504")
    return rounded


def group_slices(k: int, group_size: int) -> list[slice]:
    """The columns of each group; the last one may be ragged."""
    return [
        slice(g * group_size, min((g + 1) * group_size, k))
        for g in range(count_groups(k, group_size))
    ]
