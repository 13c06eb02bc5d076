"""Rounding in which each column makes up for the errors of those before it (Frantar et al., 2022).

The squared error of the outputs is ``tr(E H E^T)``, ``E`` what rounding adds to the weights and
``H`` the mean of ``x x^T``. With ``H = U D U^T``, ``U`` unit upper triangular, it is
``sum_j D_j |E_j + sum_{i<j} E_i U_ij|**2``: column ``j`` is rounded after the errors of the
columns before it, times ``U``, have been added. This is GPTQ without the inverse of ``H`` (QuIP,
Chee et al., 2023, theorem 6, shows that both are the same); columns go in blocks, so that most of
it is matrix products, and each group gets its grid when its turn comes.

Columns that meet large inputs go first, while there are many left to make up for their errors:
group after group by their largest column and so within each, which leaves no trace in what is
stored, or all of them by size (act-order). Then columns of like size share a scale, and the
order is part of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol
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
)
from tmac_py.quant import MatrixLike, resolve_group_size

DAMPING = 0.01
"""Part of the mean of the Hessian's diagonal that is added to it."""

_BLOCK = 32
"""Columns whose errors are passed on one by one."""

_CHUNK_ROWS = 256
"""Rows that one thread works on at once."""

Floats = NDArray[np.float32]

Order = NDArray[np.int32]


class _Solved(NamedTuple):
    """What the Hessian gives for columns in the order in which they are rounded."""

    order: Order
    """``[k]``: the columns."""
    feedback: Floats
    """``U``."""
    importance: Floats
    """The diagonal, damped."""
    settled: list[Floats]
    """For each group but the first: what carries errors of earlier ones through it."""


_solved: WeakKeyDictionary[Inputs, dict[tuple[int, bool], _Solved]] = WeakKeyDictionary()


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


def encode_with_feedback(
    matrix: MatrixLike, settings: Settings, inputs: Inputs, fit: Fit
) -> tuple[Encoded, Order | None]:
    """Quantise ``[m, k]`` for its inputs; the order of the columns if it is not theirs.

    Raises ValueError for what is not finite.
    """
    k = matrix.shape[1]
    size = resolve_group_size(k, settings.group_size)
    solved = _solve(inputs, size, settings.act_order)
    groups = group_slices(k, size)

    def encode(w: Floats, _group_size: int) -> Encoded:
        return _encode(w, groups, solved, fit)

    encoded = encode_rows(matrix, size, _CHUNK_ROWS * k, encode)
    if settings.act_order:
        return encoded, solved.order
    return _in_place(encoded, solved.order, size), None


def _solve(inputs: Inputs, group_size: int, act_order: bool) -> _Solved:
    """Matrices with the same inputs share it."""
    known = _solved.setdefault(inputs, {})
    if (group_size, act_order) not in known:
        plain = inputs.hessian()
        sizes = plain.diagonal().copy()
        order = by_size(sizes) if act_order else by_group(sizes, group_size)
        plain = plain[np.ix_(order, order)]  # [k, k] may be large: each goes as the next one comes
        hessian = damped(plain)
        del plain
        importance = hessian.diagonal().astype(np.float32)
        feedback = error_feedback(hessian)
        settled = [_inverse(feedback[g, g]) for g in group_slices(len(order), group_size)[1:]]
        known[group_size, act_order] = _Solved(order, feedback, importance, settled)
    return known[group_size, act_order]


def by_size(diagonal: Floats) -> Order:
    """Columns ``[k]``, those of the largest inputs first."""
    return np.argsort(-diagonal, kind="stable").astype(np.int32)


def by_group(diagonal: Floats, group_size: int) -> Order:
    """The same within each group, and groups by their largest; a ragged one comes last."""
    k = len(diagonal)
    within = [g.start + by_size(diagonal[g]) for g in group_slices(k, group_size)]
    first = [diagonal[columns[0]] for columns in within[: k // group_size]]
    turns = [*by_size(np.array(first)), *range(k // group_size, len(within))]
    return np.concatenate([within[g] for g in turns])


def _in_place(encoded: Encoded, order: Order, group_size: int) -> Encoded:
    """Columns that went in the order `by_group`, where they were."""
    codes = np.empty_like(encoded.codes)
    codes[:, order] = encoded.codes
    groups = np.argsort(order[::group_size] // group_size)
    offsets = None if encoded.offsets is None else np.take(encoded.offsets, groups, axis=1)
    return Encoded(codes, np.take(encoded.scales, groups, axis=1), offsets)


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


def _encode(w: Floats, groups: list[slice], solved: _Solved, fit: Fit) -> Encoded:
    """Rows ``[r, k]``; what comes out is in the order of ``solved``."""
    rows, k = w.shape
    feedback = solved.feedback
    grids: list[Grid] = []
    codes = np.empty((k, rows), np.uint8)
    errors = np.empty((k, rows), np.float32)
    weights = np.take(w.T, solved.order, axis=0)
    for g, columns in enumerate(groups):
        before = columns.start
        shift = feedback[:before, columns].T @ errors[:before]
        target = weights[columns] + shift
        expected = weights[columns] + solved.settled[g - 1].T @ shift if before else target
        grid = fit(expected, solved.importance[columns])
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
