"""``--target-bpw``: bits for each matrix, so that a file keeps to a budget with least error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.quantizers import Settings
from tmac_py.quant import MatrixLike, quantize_rtn

_STRIPS, _STRIP_ROWS = 8, 32
"""Rows that are looked at: strips evenly spaced over the matrix."""


@dataclass(frozen=True)
class Choice:
    """What so many bits cost a matrix: bytes in the file, and error."""

    bits: int
    nbytes: int
    error: float


def relative_error(
    matrix: MatrixLike, settings: Settings, mean_square: NDArray[np.float32] | None
) -> float:
    """Squared error over squared size of the outputs, as far as independent inputs tell it.

    ``mean_square`` ``[k]`` is that of the inputs (None: of equal size). Some rows stand for all.
    Raises ValueError for weights that are not finite.
    """
    w = _some_rows(matrix)
    q = quantize_rtn(
        w,
        bits=settings.bits,
        group_size=settings.group_size,
        asym=settings.asym,
        search="mse",
        importance=mean_square,
    )
    weight = np.ones(w.shape[1], np.float32) if mean_square is None else mean_square
    lost = float((np.square(q.dequantize() - w) @ weight).sum(dtype=np.float64))
    whole = float((np.square(w) @ weight).sum(dtype=np.float64))
    return lost / whole if whole else 0.0


def allocate(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """One choice for each matrix: the least sum of errors, at most ``budget`` bytes.

    ``choices`` are in order of bits. Steps along the lower convex hull of each matrix are taken in
    order of what they gain per byte (the Lagrangian solution), then those that still fit.
    More than ``budget`` are spent only if the fewest bits do so already.
    """
    chosen = {name: options[0] for name, options in choices.items()}
    spent = sum(choice.nbytes for choice in chosen.values())
    steps = []
    for order, (name, options) in enumerate(choices.items()):
        hull = _hull(options)
        for here, there in pairwise(hull):
            steps.append((-_gain(here, there), order, here.nbytes, name, here, there))
    for _, _, _, name, here, there in sorted(steps, key=lambda step: step[:3]):
        cost = there.nbytes - here.nbytes
        if chosen[name] is here and spent + cost <= budget:
            chosen[name] = there
            spent += cost
    return chosen


def _hull(options: Sequence[Choice]) -> list[Choice]:
    """The choices that no line between two others passes below; every one gains per byte."""
    hull: list[Choice] = []
    for choice in options:
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _gain(hull[-2], choice) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(here: Choice, there: Choice) -> float:
    return (here.error - there.error) / (there.nbytes - here.nbytes)


def _some_rows(matrix: MatrixLike) -> NDArray[np.float32]:
    m = matrix.shape[0]
    if m <= _STRIPS * _STRIP_ROWS:
        return np.asarray(matrix[slice(0, m)], np.float32)
    starts = np.linspace(0, m - _STRIP_ROWS, _STRIPS).astype(int)
    return np.concatenate([matrix[slice(int(i), int(i) + _STRIP_ROWS)] for i in starts])
