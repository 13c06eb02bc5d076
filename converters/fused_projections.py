"""Projections that a checkpoint stores as one matrix: the rows of one after those of another.

As in the attention and feed-forward of transformers' Phi3 (``qkv_proj``, ``gate_up_proj``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tmac_py.config import is_matrix
from tmac_py.converters.checkpoint import Shape
from tmac_py.quant import MatrixLike, QuantTensor

_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


@dataclass(frozen=True)
class StoredMatrix:
    """Where a matrix is stored: rows ``[start, start + m)`` of a module of ``shape``."""

    module: str
    shape: Shape
    start: int = 0


def stored_matrices(shapes: Mapping[str, Shape], stored: Iterable[str]) -> dict[str, StoredMatrix]:
    """For each matrix of a model the module that holds it, by the names of the tensors there are.

    Names of matrices end with ``.weight``, names of modules are without it.
    """
    modules = {name.rpartition(".")[0] for name in stored}
    found = {
        name: StoredMatrix(name.removesuffix(".weight"), shape)
        for name, shape in shapes.items()
        if is_matrix(name, shape)
    }
    for fused, parts in _FUSED.items():
        for module in modules:
            prefix = module.removesuffix(fused)
            names = [f"{prefix}{part}.weight" for part in parts]
            if prefix == module or not found.keys() >= set(names):
                continue
            ends = np.cumsum([shapes[name][0] for name in names])
            shape = (int(ends[-1]), shapes[names[0]][1])
            for name, end in zip(names, ends, strict=True):
                found[name] = StoredMatrix(module, shape, int(end) - shapes[name][0])
    return found


def load_rows(
    load: Callable[[], QuantTensor | MatrixLike], start: int, m: int
) -> QuantTensor | MatrixLike:
    """Rows ``[start, start + m)`` of the matrix that ``load`` gives."""
    whole, rows = load(), slice(start, start + m)
    if not isinstance(whole, QuantTensor):
        return _Rows(whole, start, m)
    return replace(
        whole,
        codes=np.ascontiguousarray(whole.codes[rows]),
        scales=None if whole.scales is None else np.ascontiguousarray(whole.scales[rows]),
        offsets=None if whole.offsets is None else np.ascontiguousarray(whole.offsets[rows]),
    )


@dataclass(frozen=True)
class _Rows:
    """Some rows of a matrix of floats."""

    whole: MatrixLike
    start: int
    m: int

    @property
    def shape(self) -> Shape:
        """``(m, k)``."""
        return (self.m, self.whole.shape[1])

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        first, last, _ = rows.indices(self.m)
        return self.whole[slice(self.start + first, self.start + max(first, last))]
