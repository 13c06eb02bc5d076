"""``hqq``: half-quadratic quantisation (Badri and Shaji, 2023), which needs no data.

Outliers should cost less than a square: with the scale of the min-max range, the offset of each
group minimises ``sum |w - (s q + o)|**0.7``. The errors are split into a sparse part ``e`` (a
generalised soft threshold) and the rest, and both are solved for in turn. Errors are measured in
steps, so that the method does not depend on the size of the weights; the best offset met is kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.quantizers.base import (
    Encoded,
    Inputs,
    Settings,
    encode_rows,
    to_fp16,
    uniform_tensor,
)
from tmac_py.quant import MatrixLike, QuantTensor, count_groups, encode_groups, group_blocks

NORM = 0.7
"""Power of the absolute error."""

_ITERATIONS = 20
_BETA, _BETA_GROWTH = 10.0, 1.01
_CHUNK_ELEMENTS = 1 << 16


def quantize_hqq(matrix: MatrixLike, settings: Settings, inputs: Inputs | None) -> QuantTensor:
    """Always with an offset per group: it is what the method chooses."""
    del inputs

    def encode(w: NDArray[np.float32], group_size: int) -> Encoded:
        rows, k = w.shape
        codes = np.empty((rows, k), np.uint8)
        scales = np.empty((rows, count_groups(k, group_size)), np.float16)
        offsets = np.empty_like(scales)
        for columns, groups in group_blocks(k, group_size):
            part = w[:, columns].reshape(rows, groups.stop - groups.start, -1)
            c, scales[:, groups], offsets[:, groups] = _encode(part, settings.bits)
            codes[:, columns] = c.reshape(rows, -1)
        return Encoded(codes, scales, offsets)

    encoded = encode_rows(matrix, settings.group_size, _CHUNK_ELEMENTS, encode)
    return uniform_tensor(encoded, settings.bits, settings.group_size)


def _encode(
    w: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Codes [r, g, n], scales and offsets [r, g] of w [r, g, n]."""
    codes, scales, offsets = encode_groups(w, bits, True, "minmax")
    s = scales.astype(np.float32)[..., None]
    inverse = np.divide(np.float32(1), s, out=np.zeros_like(s), where=s != 0)
    scaled = w * inverse  # in steps
    shift = offsets.astype(np.float32)[..., None] * inverse
    best = np.full(scales.shape, np.inf, np.float32)
    beta = _BETA
    for _ in range(_ITERATIONS + 1):
        rounded = to_fp16((shift * s)[..., 0], "offset")
        shift = rounded.astype(np.float32)[..., None] * inverse
        q = np.clip(np.rint(scaled - shift), 0, (1 << bits) - 1)
        size = np.abs(scaled - shift - q)
        powers = np.maximum(size, np.float32(1e-8)) ** np.float32(NORM - 1)
        error = (size * powers).sum(axis=2)  # |e|**NORM
        better = error < best
        best[better] = error[better]
        offsets[better] = rounded[better]
        codes[better] = q[better].astype(np.uint8)
        sparse = np.sign(scaled - shift - q) * np.maximum(size - powers / np.float32(beta), 0)
        shift = (scaled - q - sparse).mean(axis=2, keepdims=True)
        beta *= _BETA_GROWTH
    constant = scales == 0  # of one value: the offset alone
    codes[constant] = 0
    if constant.any():
        offsets[constant] = to_fp16(w.min(axis=2)[constant], "offset")
    return codes, scales, offsets
