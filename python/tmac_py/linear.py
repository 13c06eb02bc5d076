"""One packed matrix on its own, from NumPy and to NumPy."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.machine import default_threads
from tmac_py.quant import QuantTensor, quantize_rtn


class LutLinear:
    """A quantised matrix ``[m, k]`` multiplied by table lookup.

    The arithmetic is the bit-serial mpGEMM of T-MAC (Wei et al., 2024, section 3): groups of four
    activations become 16-entry tables of their signed sums, which the bit planes of the weights
    index.

    Args:
        weights: codes, scales and offsets of the matrix.
        threads: threads to use; by default one per physical core that this process may run on.
        tables: ``"int8"`` (fast) or ``"exact"`` (activations rounded to 14 bits, exact sums).
    """

    def __init__(
        self,
        weights: QuantTensor,
        *,
        threads: int | None = None,
        tables: Literal["int8", "exact"] = "int8",
    ) -> None:
        spec = weights.spec
        packed = _core.pack(
            weights.codes,
            weights.scales,
            weights.offsets,
            bits=spec.bits,
            group_size=spec.group_size,
            offset_kind=spec.offset_kind,
        )
        self._linear = _core.Linear(
            packed,
            m=spec.m,
            k=spec.k,
            bits=spec.bits,
            group_size=spec.group_size,
            offset_kind=spec.offset_kind,
            zero=spec.zero,
        )
        self._pool = _core.ThreadPool(default_threads() if threads is None else threads)
        self._tables = tables
        self.spec = spec
        self.nbytes = packed.nbytes
        """Bytes of the packed matrix."""

    @classmethod
    def from_dense(
        cls,
        w: NDArray[np.floating],
        *,
        bits: int,
        group_size: int = 32,
        asym: bool = False,
        search: Literal["minmax", "mse"] = "mse",
        threads: int | None = None,
        tables: Literal["int8", "exact"] = "int8",
    ) -> LutLinear:
        """Quantise a dense matrix by rounding to nearest, and pack it.

        Args:
            w: ``[m, k]``, any float dtype, finite.
            bits: 1 to 8.
            group_size: weights along k that share a scale: a multiple of 4, or k.
            asym: store an offset per group as well.
            search: ``"mse"`` tries narrower ranges for each group, ``"minmax"`` does not.
            threads: see the class.
            tables: see the class.

        Raises:
            ValueError: if an argument is out of range.
        """
        dense = np.ascontiguousarray(w, dtype=np.float32)
        weights = quantize_rtn(dense, bits=bits, group_size=group_size, asym=asym, search=search)
        return cls(weights, threads=threads, tables=tables)

    def forward(self, x: NDArray[np.floating]) -> NDArray[np.float32]:
        """Multiply: ``x [..., k]`` -> ``y [..., m]`` float32, ``y = x w^T``.

        Raises:
            ValueError: if the last dimension of ``x`` is not k, or ``x`` is empty.
        """
        rows = np.ascontiguousarray(x, dtype=np.float32)
        if rows.ndim == 0 or rows.shape[-1] != self.spec.k:
            raise ValueError(f"x must be [..., {self.spec.k}], not {list(rows.shape)}")
        flat = rows.reshape(-1, self.spec.k)
        y = _core.linear_forward(self._linear, flat, self._pool, tables=self._tables)
        return y.reshape(*rows.shape[:-1], self.spec.m)

    __call__ = forward
