"""Modules that a checkpoint stores as one: the rows of q, k and v, or of gate and up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.checkpoint import Shape
from tmac_py.quant import MatrixLike, QuantTensor


@dataclass(frozen=True)
class Stored:
    """Where the rows of one matrix are: in the matrix ``name`` of ``shape``, from ``row`` on."""

    name: str
    shape: Shape
    row: int


def stored_matrices(
    shapes: Mapping[str, Shape], fused: Mapping[str, Iterable[str]]
) -> dict[str, Stored]:
    """For the name of each matrix in ``shapes`` where it is stored.

    ``fused`` maps a module, without the layer's name, to those whose rows it has, in order.
    """
    place = {name: Stored(name, shape, 0) for name, shape in shapes.items() if len(shape) == 2}
    for whole, parts in fused.items():
        for first in [name for name in place if name.endswith(f".{next(iter(parts))}.weight")]:
            prefix = first.removesuffix(f"{next(iter(parts))}.weight")
            names = [f"{prefix}{part}.weight" for part in parts]
            rows = [shapes[name][0] for name in names]
            shape = (sum(rows), shapes[first][1])
            for i, name in enumerate(names):
                place[name] = Stored(f"{prefix}{whole}.weight", shape, sum(rows[:i]))
    return place


def take_rows(loaded: QuantTensor | MatrixLike, row: int, shape: Shape) -> QuantTensor | MatrixLike:
    """The matrix of ``shape`` that begins at ``row`` of the loaded one."""
    if row == 0 and shape[0] == (loaded.m if isinstance(loaded, QuantTensor) else loaded.shape[0]):
        return loaded
    if not isinstance(loaded, QuantTensor):
        return _Rows(loaded, row, shape)
    rows = slice(row, row + shape[0])
    return replace(
        loaded,
        codes=loaded.codes[rows],
        scales=None if loaded.scales is None else loaded.scales[rows],
        offsets=None if loaded.offsets is None else loaded.offsets[rows],
    )


@dataclass(frozen=True)
class _Rows:
    """Some rows of a lazy matrix."""

    whole: MatrixLike
    row: int
    shape: Shape

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        start, stop, _ = rows.indices(self.shape[0])
        return self.whole[slice(self.row + start, self.row + stop)]
