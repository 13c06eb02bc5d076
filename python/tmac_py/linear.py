"""Products with packed matrices on their own, from NumPy and to NumPy (docs/linear.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tmac_py import _core
from tmac_py.checks import check_tables, check_threads, check_whole
from tmac_py.errors import OptionError
from tmac_py.packing import open_linear, pack
from tmac_py.pool import thread_pool
from tmac_py.quant import MAX_BITS, QuantTensor, Search, quantize_rtn
from tmac_py.spec import LinearSpec, Tables

Packed = tuple[NDArray[np.uint8], LinearSpec]
"""A packed matrix: its bytes, uint8 ``[nbytes]``, and what they are (as `LutFile.linear` gives)."""


class LutLinear:
    """A quantised matrix ``[m, k]`` multiplied by table lookup.

    The arithmetic is the bit-serial mpGEMM of T-MAC (Wei et al., 2024, section 3): groups of four
    activations become 16-entry tables of their signed sums, which the bit planes of the weights
    index; for ternary weights groups of three. For more than 16 vectors at a time uniform and
    ternary codes are mostly unpacked and multiplied as integers (docs/kernels.md, "Which kernel
    when"): with exact tables to the same bits, with ``"int8"`` as accurate, but rounded otherwise.
    Immutable; any number of threads may use it.

    Args:
        weights: codes, scales and offsets of the matrix, and their order.
        threads: 1 to 1024; None takes the performance cores that this process may use (CPU
            affinity and quota included). Matrices with the same number share the threads.
        tables: ``"int8"`` (fast), ``"exact"`` (activations rounded to 14 bits, exact sums) or
            ``"exact8"`` (activations rounded to 8 bits per token, exact sums: BitNet's arithmetic).

    Attributes:
        packed: the packed matrix, uint8 ``[nbytes]``.
        spec: shape and encoding.

    Raises:
        OptionError: an argument is not allowed.
    """

    def __init__(
        self, weights: QuantTensor, *, threads: int | None = None, tables: Tables = "int8"
    ) -> None:
        if not isinstance(weights, QuantTensor):
            raise OptionError(
                f"weights is of type {type(weights).__name__}; allowed: a QuantTensor"
            )
        check_tables(tables)
        check_threads(threads)
        self._open((pack(weights), weights.spec), weights.order, threads, tables)

    @classmethod
    def from_packed(
        cls,
        packed: NDArray[np.uint8],
        spec: LinearSpec,
        *,
        order: NDArray[np.int32] | None = None,
        threads: int | None = None,
        tables: Tables = "int8",
    ) -> LutLinear:
        """Multiply with bytes that are packed already, without copying them.

        Args:
            packed: uint8 ``[nbytes]``, in C order; it has to stay as it is.
            spec: what the bytes are.
            order: int32 ``[k]``, as in `QuantTensor`.
            threads: see the class.
            tables: see the class.

        Raises:
            OptionError: bytes, ``spec`` and ``order`` do not fit together, or as for the class.
        """
        linear = cls.__new__(cls)
        linear._open((packed, spec), order, threads, tables)
        return linear

    def _open(
        self,
        weights: Packed,
        order: NDArray[np.int32] | None,
        threads: int | None,
        tables: Tables,
    ) -> None:
        self._tables = check_tables(tables)
        self._pool = thread_pool(check_threads(threads))
        self.packed, self.spec = weights
        if not isinstance(self.packed, np.ndarray) or not isinstance(self.spec, LinearSpec):
            kinds = " and ".join(type(part).__name__ for part in weights)
            raise OptionError(f"a packed matrix is {kinds}; allowed: uint8 [nbytes] and LinearSpec")
        try:
            self._linear = open_linear(self.packed, self.spec, order)
        except ValueError as error:
            raise OptionError(str(error)) from error

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix."""
        return self.packed.nbytes

    @classmethod
    def from_dense(
        cls,
        w: ArrayLike,
        *,
        bits: int,
        group_size: int = 32,
        asym: bool = False,
        search: Search = "mse",
        threads: int | None = None,
        tables: Tables = "int8",
    ) -> LutLinear:
        """Quantise a dense matrix by rounding to nearest, and pack it: see `quantize`.

        Args:
            w: ``[m, k]``, any real dtype, finite.
            bits: this, ``group_size``, ``asym`` and ``search``: see `quantize`.
            group_size: weights along k that share a scale.
            asym: store an offset per group as well.
            search: how ranges of groups are chosen.
            threads: see the class.
            tables: see the class.

        Raises:
            OptionError: an argument is not allowed.
        """
        check_tables(tables)
        check_threads(threads)
        weights = quantize(w, bits=bits, group_size=group_size, asym=asym, search=search)
        return cls(weights, threads=threads, tables=tables)

    def forward(self, x: ArrayLike) -> NDArray[np.float32]:
        """Multiply: ``x [..., k]``, any real dtype -> ``y [..., m]`` float32, ``y = x w^T``.

        Raises:
            OptionError: the last dimension of ``x`` is not k, or ``x`` is empty.
        """
        rows = _float32("x", x)
        if rows.ndim == 0 or rows.shape[-1] != self.spec.k or rows.size == 0:
            raise OptionError(f"x is {list(rows.shape)}; allowed: [..., {self.spec.k}], not empty")
        flat = rows.reshape(-1, self.spec.k)
        y = _core.linear_forward(self._linear, flat, self._pool, tables=self._tables)
        return y.reshape(*rows.shape[:-1], self.spec.m)

    __call__ = forward


def quantize(
    w: ArrayLike,
    *,
    bits: int,
    group_size: int = 32,
    asym: bool = False,
    search: Search = "mse",
) -> QuantTensor:
    """Round a dense matrix to the nearest codes, group by group.

    Scales are fp16: groups whose largest weight is below about 1e-4 lose precision.

    Args:
        w: ``[m, k]``, any real dtype, finite.
        bits: 1 to 8.
        group_size: weights along k that share a scale: a multiple of 4; -1, like k and all above
            it, is the whole row.
        asym: store an offset per group as well.
        search: ``"mse"`` tries narrower ranges for each group, ``"minmax"`` does not.

    Raises:
        OptionError: an argument is not allowed.
    """
    check_whole("bits", bits, 1, MAX_BITS)
    check_whole("group_size", group_size, -1)
    try:
        return quantize_rtn(
            _float32("w", w), bits=bits, group_size=group_size, asym=asym, search=search
        )
    except ValueError as error:
        raise OptionError(str(error)) from error


def mpgemm(
    x: ArrayLike,
    weights: QuantTensor | Packed,
    *,
    threads: int | None = None,
    tables: Tables = "int8",
) -> NDArray[np.float32]:
    """Multiply activations with low-bit weights: the mpGEMM of T-MAC (Wei et al., 2024).

    One call of `LutLinear.forward`. A `QuantTensor` is packed each time, which takes longer than
    the product: for more than one product make a `LutLinear`, or pack once.

    Args:
        x: ``[..., k]``, any real dtype.
        weights: a quantised matrix ``[m, k]``, or a packed one and its spec, neither copied nor
            changed.
        threads: see `LutLinear`.
        tables: see `LutLinear`.

    Returns:
        ``y [..., m]`` float32, ``y = x w^T``.

    Raises:
        OptionError: an argument is not allowed, or ``x`` does not fit the matrix.
    """
    if isinstance(weights, tuple) and len(weights) == 2:
        return LutLinear.from_packed(*weights, threads=threads, tables=tables)(x)
    return LutLinear(weights, threads=threads, tables=tables)(x)


def _float32(name: str, values: ArrayLike) -> NDArray[np.float32]:
    """``values`` as a float32 array in C order; what float32 cannot hold becomes infinite."""
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise OptionError(f"{name} must be an array of real numbers: {error}") from error
    if array.dtype.kind not in "fiu":
        raise OptionError(f"{name} is of type {array.dtype}; allowed: real numbers")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, order="C", copy=False)
