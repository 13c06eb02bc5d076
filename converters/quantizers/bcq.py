"""``bcq``: binary-coding quantisation with an offset (Park et al., 2024, LUT-GEMM, section 3).

A group of weights is ``sum_p a_p b_p + z`` with ``b_p`` of -1 and 1. Alternating optimisation (Xu
et al., 2018): least squares give ``a`` and ``z`` for the codes, then every weight takes the nearest
of the ``2**bits`` values. Neither step raises the squared error. It starts twice, from even steps
over the best range and from the greedy decomposition (signs and mean absolute values of what
is left, plane by plane), and each group keeps the better end.

Where the inputs are known, the squared error is weighted by their mean square, and columns make up
for the errors of those before them as in ``gptq``. Above 4 bits, which the layout does not hold,
even steps are as good: ``gptq`` or, without inputs, ``mse``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.quantizers.base import Encoded, Inputs, Settings, encode_rows, to_fp16
from tmac_py.converters.quantizers.feedback import encode_with_feedback
from tmac_py.converters.quantizers.gptq import quantize_gptq
from tmac_py.converters.quantizers.rtn import quantize_mse
from tmac_py.quant import (
    MAX_BCQ_BITS,
    MatrixLike,
    QuantTensor,
    bcq_tensor,
    count_groups,
    encode_groups,
    group_blocks,
    resolve_group_size,
)

ITERATIONS = 10
_CHUNK_ELEMENTS = 1 << 15
_RIDGE = 1e-6
"""Keeps least squares solvable for codes that do not tell the planes apart."""

Floats = NDArray[np.float32]


def quantize_bcq(matrix: MatrixLike, settings: Settings, inputs: Inputs | None) -> QuantTensor:
    """Up to 4 bits binary-coded, with an offset; above with even steps."""
    bits, size = settings.bits, resolve_group_size(matrix.shape[1], settings.group_size)
    if bits > MAX_BCQ_BITS:
        even = quantize_mse if inputs is None else quantize_gptq
        return even(matrix, settings, inputs)
    order = None
    if inputs is None:
        encoded = _encode_alone(matrix, settings)
    else:
        encoded, order = encode_with_feedback(
            matrix,
            settings,
            inputs,
            lambda w, importance: _Values(*_encode(w, bits, importance)[1:]),
        )
    codes, scales, offsets = encoded
    assert offsets is not None
    return bcq_tensor(codes, scales, offsets, group_size=size, order=order)


class _Values:
    """The grid of scales ``[bits, r]`` and offsets ``[r]``."""

    def __init__(self, scales: NDArray[np.float16], offsets: NDArray[np.float16]) -> None:
        self.scales = np.ascontiguousarray(scales.T)
        self.offsets = offsets
        solution = np.concatenate([scales, offsets[None]]).astype(np.float32)
        codes, values = _sorted_values(solution, len(scales))
        self._codes, self._values = codes.reshape(-1), values.reshape(-1)
        self._middles = (values[:-1] + values[1:]) / 2
        self._rows = np.arange(len(offsets))

    def nearest(self, column: Floats) -> tuple[NDArray[np.uint8], Floats]:
        rank = np.zeros(len(column), np.uint8)
        for middle in self._middles:
            rank += column > middle
        place = rank * np.intp(len(column)) + self._rows
        return self._codes[place], self._values[place]


def _encode_alone(matrix: MatrixLike, settings: Settings) -> Encoded:
    def encode(w: Floats, group_size: int) -> Encoded:
        rows, k = w.shape
        codes = np.empty((rows, k), np.uint8)
        scales = np.empty((rows, count_groups(k, group_size), settings.bits), np.float16)
        offsets = np.empty(scales.shape[:2], np.float16)
        for columns, groups in group_blocks(k, group_size):
            n = groups.stop - groups.start
            part = np.ascontiguousarray(w[:, columns].reshape(rows * n, -1).T)
            c, s, o = _encode(part, settings.bits, None)
            codes[:, columns] = c.T.reshape(rows, -1)
            scales[:, groups] = s.T.reshape(rows, n, -1)
            offsets[:, groups] = o.reshape(rows, n)
        return Encoded(codes, scales, offsets)

    return encode_rows(matrix, settings.group_size, _CHUNK_ELEMENTS, encode)


def alternate(
    w: Floats, codes: NDArray[np.uint8], bits: int, importance: Floats | None = None
) -> Iterator[tuple[NDArray[np.uint8], Floats]]:
    """The alternating optimisation of groups w [n, g] from ``codes`` [n, g], without end.

    ``importance`` [n] (default: 1) weighs the squared errors.
    Yields codes, scales and offset [bits + 1, g]: first the best ones for ``codes``.
    """
    while True:
        solution = _least_squares(w, codes, bits, importance)
        yield codes, solution
        codes = _nearest(w, solution, bits)


def squared_error(
    w: Floats,
    codes: NDArray[np.uint8],
    solution: Floats,
    bits: int,
    importance: Floats | None = None,
) -> Floats:
    """Of each group, [g]."""
    rest = w - solution[bits]
    for plane in range(bits):
        rest -= _signs(codes, plane) * solution[plane]
    if importance is None:
        return np.asarray(np.einsum("ng,ng->g", rest, rest))
    return np.asarray(np.einsum("ng,ng,n->g", rest, rest, importance))


def _encode(
    w: Floats, bits: int, importance: Floats | None
) -> tuple[NDArray[np.uint8], NDArray[np.float16], NDArray[np.float16]]:
    """Codes [n, g], scales [bits, g] and offsets [g] of the groups w [n, g]."""
    kept: tuple[NDArray[np.uint8], Floats, Floats] | None = None
    for start in (_evenly_spaced(w, bits), _greedy(w, bits)):
        _, solution = next(islice(alternate(w, start, bits, importance), ITERATIONS, None))
        rounded = to_fp16(solution, "scale").astype(np.float32)
        codes = _nearest(w, rounded, bits)
        error = squared_error(w, codes, rounded, bits, importance)
        if kept is None:
            kept = codes, rounded, error
            continue
        better = error < kept[2]
        np.copyto(kept[0], codes, where=better)
        np.copyto(kept[1], rounded, where=better)
    assert kept is not None
    codes, rounded, _ = kept
    return codes, rounded[:bits].astype(np.float16), rounded[bits].astype(np.float16)


def _greedy(w: Floats, bits: int) -> NDArray[np.uint8]:
    """The top plane holds the signs of what is above the mean, the next those of the rest, ..."""
    rest = w - w.mean(axis=0)
    codes = np.zeros(w.shape, np.uint8)
    for plane in reversed(range(bits)):
        positive = rest >= 0
        codes |= positive.astype(np.uint8) << np.uint8(plane)
        size = np.abs(rest).mean(axis=0)
        rest -= np.where(positive, size, -size)
    return codes


def _evenly_spaced(w: Floats, bits: int) -> NDArray[np.uint8]:
    codes, _, _ = encode_groups(np.ascontiguousarray(w.T)[:, None], bits, True, "mse")
    return np.ascontiguousarray(codes[:, 0].T)


def _signs(codes: NDArray[np.uint8], plane: int) -> Floats:
    signs = (codes >> plane & 1).astype(np.float32)
    signs *= 2
    signs -= 1
    return np.asarray(signs)


def _least_squares(
    w: Floats, codes: NDArray[np.uint8], bits: int, importance: Floats | None
) -> Floats:
    """Scales and offset [bits + 1, g] of the least squared error for these codes."""
    weight = np.ones((len(w), 1), np.float32) if importance is None else importance[:, None]
    basis = [*(_signs(codes, plane) for plane in range(bits)), None]  # None: ones
    normal = np.empty((bits + 1, bits + 1, w.shape[1]))
    right = np.empty((bits + 1, w.shape[1]))
    for i, b in enumerate(basis):
        weighted = weight if b is None else weight * b
        right[i] = (w * weighted).sum(axis=0)
        for j, other in enumerate(basis[i:], i):
            if i == j:
                normal[i, i] = weight.sum() * (1 + _RIDGE)
            else:
                product = weighted if other is None else weighted * other
                normal[i, j] = normal[j, i] = product.sum(axis=0)
    return _solve(normal, right).astype(np.float32)


def _solve(a: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solutions [n, g] of positive definite systems a [n, n, g] with right sides x; in place."""
    n = len(x)
    for i in range(n):
        for j in range(i + 1, n):
            factor = a[j, i] / a[i, i]
            a[j, i:] -= factor * a[i, i:]
            x[j] -= factor * x[i]
    for i in reversed(range(n)):
        for j in range(i + 1, n):
            x[i] -= a[i, j] * x[j]
        x[i] /= a[i, i]
    return x


def _nearest(w: Floats, solution: Floats, bits: int) -> NDArray[np.uint8]:
    """Codes [n, g] of the nearest of the values of each group."""
    order, values = _sorted_values(solution, bits)
    rank = np.zeros(w.shape, np.uint8)
    for low, high in pairwise(values):
        rank += w > (low + high) / 2
    return np.take_along_axis(order, rank, axis=0)


def _sorted_values(solution: Floats, bits: int) -> tuple[NDArray[np.uint8], Floats]:
    """Codes and values [2**bits, g] of each group, in order of the values."""
    values = np.repeat(solution[bits][None], 1 << bits, axis=0)
    for plane in range(bits):
        values += _signs(np.arange(1 << bits, dtype=np.uint8)[:, None], plane) * solution[plane]
    order = values.argsort(axis=0, kind="stable").astype(np.uint8)
    values.sort(axis=0)
    return order, values
