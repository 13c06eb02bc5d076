"""``gptq``: each column makes up for the errors of those before it (Frantar et al., 2022).

The squared error of the outputs is ``tr(E H E^T)``, ``E`` what rounding adds to the weights and
``H`` the mean of ``x x^T``. With ``H = U D U^T``, ``U`` unit upper triangular, it is
``sum_j D_j |E_j + sum_{i<j} E_i U_ij|**2``: column ``j`` is rounded after the errors of the
columns before it, times ``U``, have been added. This is GPTQ without the inverse of ``H`` (QuIP,
Chee et al., 2023, theorem 6, shows that both are the same); columns go in blocks, so that most of
it is matrix products, and each group gets its scale when its turn comes.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.quantizers.base import (
    NOT_FINITE,
    Encoded,
    Inputs,
    Settings,
    encode_rows,
    group_slices,
    uniform_tensor,
)
from tmac_py.quant import (
    MatrixLike,
    QuantTensor,
    encode_groups,
    resolve_group_size,
    symmetric_zero,
)

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it."""

_BLOCK = 32
"""Columns whose errors are passed on one by one."""

_CHUNK_ROWS = 256
"""Rows that one thread works on at once."""

Floats = NDArray[np.float32]

_solved: WeakKeyDictionary[Inputs, tuple[Floats, Floats]] = WeakKeyDictionary()


def quantize_gptq(matrix: MatrixLike, settings: Settings, inputs: Inputs | None) -> QuantTensor:
    """Rounds to the grid with the least squared error of each group, weighted by mean ``x**2``."""
    assert inputs is not None
    feedback, importance = _solve(inputs)
    columns = group_slices(
        matrix.shape[1], resolve_group_size(matrix.shape[1], settings.group_size)
    )
    settled = [_inverse(feedback[c, c]) for c in columns]

    def encode(w: Floats, _group_size: int) -> Encoded:
        return _encode(w, settings, columns, feedback, settled, importance)

    encoded = encode_rows(matrix, settings.group_size, _CHUNK_ROWS * matrix.shape[1], encode)
    return uniform_tensor(encoded, settings.bits, settings.group_size)


def _solve(inputs: Inputs) -> tuple[Floats, Floats]:
    """``U`` and the diagonal of the damped Hessian; matrices with the same inputs share them."""
    if inputs not in _solved:
        hessian = damped(inputs.hessian)
        diagonal = np.ascontiguousarray(hessian.diagonal(), np.float32)
        _solved[inputs] = error_feedback(hessian), diagonal
    return _solved[inputs]


def damped(hessian: Floats) -> NDArray[np.float64]:
    """``hessian`` [k, k], made positive definite. Raises ValueError if it is not finite."""
    result = hessian.astype(np.float64)
    mean = float(result.diagonal().mean())
    if not np.isfinite(mean):
        raise ValueError(NOT_FINITE)
    result[np.diag_indices_from(result)] += DAMPING * mean if mean > 0 else 1.0
    return result


def error_feedback(hessian: NDArray[np.float64]) -> Floats:
    """``U`` [k, k] of ``hessian = U D U^T``, unit upper triangular."""
    lower = np.linalg.cholesky(hessian[::-1, ::-1])
    upper = lower[::-1, ::-1]
    return np.ascontiguousarray(upper / upper.diagonal(), np.float32)


def _inverse(unit_upper: Floats) -> Floats:
    """Carries errors of earlier groups through this one: the weights that the group will round, if
    its own errors are zero."""
    return np.linalg.inv(unit_upper.astype(np.float64)).astype(np.float32)


def _encode(
    w: Floats,
    settings: Settings,
    groups: list[slice],
    feedback: Floats,
    settled: list[Floats],
    importance: Floats,
) -> Encoded:
    rows, k = w.shape
    bits, asym = settings.bits, settings.asym
    zero = np.float32(0 if asym else symmetric_zero(bits))
    scales = np.empty((len(groups), rows), np.float16)
    offsets = np.empty_like(scales)
    codes = np.empty((k, rows), np.uint8)
    errors = np.empty((k, rows), np.float32)
    weights = np.ascontiguousarray(w.T)
    for g, columns in enumerate(groups):
        before = columns.start
        shift = feedback[:before, columns].T @ errors[:before]
        target = weights[columns] + shift
        expected = weights[columns] + settled[g].T @ shift if before else target
        _, s, o = encode_groups(
            np.ascontiguousarray(expected.T)[:, None], bits, asym, "mse", importance[None, columns]
        )
        scales[g], offsets[g] = s[:, 0], o[:, 0]
        scale, offset = s[:, 0].astype(np.float32), o[:, 0].astype(np.float32)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        for start in range(columns.start, columns.stop, _BLOCK):
            stop = min(start + _BLOCK, columns.stop)
            block = target[start - before : stop - before]
            if start > before:
                block += feedback[before:start, start:stop].T @ errors[before:start]
            for j in range(start, stop):
                row = block[j - start]
                q = row - offset
                q *= inverse
                q += zero
                np.rint(q, out=q)
                np.clip(q, 0, (1 << bits) - 1, out=q)
                codes[j] = q
                q -= zero
                q *= scale
                q += offset
                np.subtract(weights[j], q, out=errors[j])
                block[j - start + 1 :] += feedback[j, j + 1 : stop, None] * errors[j]
    return Encoded(
        np.ascontiguousarray(codes.T),
        np.ascontiguousarray(scales.T),
        np.ascontiguousarray(offsets.T) if asym else None,
    )
