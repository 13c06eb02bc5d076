"""Rounding in which each column makes up for the errors of those before it (Frantar et al., 2022).

The squared error of the outputs is ``tr(E H E^T)``, ``E`` what rounding adds to the weights and
``H`` the mean of ``x x^T``. With ``H = U D U^T``, ``U`` unit upper triangular, it is
``sum_j D_j |E_j + sum_{i<j} E_i U_ij|**2``: column ``j`` is rounded after the errors of the
columns before it, times ``U``, have been added. This is GPTQ without the inverse of ``H`` (QuIP,
Chee et al., 2023, theorem 6, shows that both are the same); columns go in blocks, so that most of
it is matrix products, and each group gets its grid when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.quantizers.base import (
    NOT_FINITE,
    Encoded,
    Inputs,
    encode_rows,
    group_slices,
)
from tmac_py.quant import MatrixLike, resolve_group_size

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it."""

_BLOCK = 32
"""Columns whose errors are passed on one by one."""

_CHUNK_ROWS = 256
"""Rows that one thread works on at once."""

Floats = NDArray[np.float32]

_solved: WeakKeyDictionary[Inputs, tuple[Floats, Floats]] = WeakKeyDictionary()


class Grid(Protocol):
    """The values that a group of each of ``r`` rows may take."""

    @property
    def scales(self) -> NDArray[np.float16]:
        """``[r]`` or ``[r, bits]``."""

    @property
    def offsets(self) -> NDArray[np.float16] | None:
        """``[r]``, or None for a grid without."""

    def nearest(self, column: Floats) -> tuple[NDArray[np.generic], Floats]:
        """Codes and values ``[r]`` nearest to the weights ``column`` ``[r]``."""


Fit = Callable[[Floats, Floats], Grid]
"""The grid for the weights ``[n, r]`` of a group, whose columns weigh ``[n]``."""


def encode_with_feedback(matrix: MatrixLike, group_size: int, inputs: Inputs, fit: Fit) -> Encoded:
    """Quantise ``[m, k]`` for its inputs. Raises ValueError for what is not finite."""
    feedback, importance = _solve(inputs)
    k = matrix.shape[1]
    groups = group_slices(k, resolve_group_size(k, group_size))
    settled = [_inverse(feedback[columns, columns]) for columns in groups]

    def encode(w: Floats, _group_size: int) -> Encoded:
        return _encode(w, groups, feedback, settled, importance, fit)

    return encode_rows(matrix, group_size, _CHUNK_ROWS * k, encode)


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
    groups: list[slice],
    feedback: Floats,
    settled: list[Floats],
    importance: Floats,
    fit: Fit,
) -> Encoded:
    rows, k = w.shape
    grids: list[Grid] = []
    codes = np.empty((k, rows), np.uint8)
    errors = np.empty((k, rows), np.float32)
    weights = np.ascontiguousarray(w.T)
    for g, columns in enumerate(groups):
        before = columns.start
        shift = feedback[:before, columns].T @ errors[:before]
        target = weights[columns] + shift
        expected = weights[columns] + settled[g].T @ shift if before else target
        grid = fit(expected, importance[columns])
        grids.append(grid)
        for start in range(columns.start, columns.stop, _BLOCK):
            stop = min(start + _BLOCK, columns.stop)
            block = target[start - before : stop - before]
            if start > before:
                block += feedback[before:start, start:stop].T @ errors[before:start]
            for j in range(start, stop):
                codes[j], values = grid.nearest(block[j - start])
                np.subtract(weights[j], values, out=errors[j])
                block[j - start + 1 :] += feedback[j, j + 1 : stop, None] * errors[j]
    offsets = [grid.offsets for grid in grids if grid.offsets is not None]
    return Encoded(
        np.ascontiguousarray(codes.T),
        np.stack([grid.scales for grid in grids], axis=1),
        np.stack(offsets, axis=1) if offsets else None,
    )
