"""Rounding to nearest: ``rtn`` over the range of each group, ``mse`` over its best range."""

from __future__ import annotations

from tmac_py.converters.quantizers.base import Inputs, Settings
from tmac_py.quant import MatrixLike, QuantTensor, quantize_rtn


def quantize_minmax(matrix: MatrixLike, settings: Settings, inputs: Inputs | None) -> QuantTensor:
    """``rtn``: from the smallest to the largest weight of a group. See `quantize_rtn`."""
    del inputs
    return quantize_rtn(
        matrix, bits=settings.bits, group_size=settings.group_size, asym=settings.asym
    )


def quantize_mse(matrix: MatrixLike, settings: Settings, inputs: Inputs | None) -> QuantTensor:
    """``mse``: the range with the least squared error, weighted by mean ``x**2`` if it is known."""
    return quantize_rtn(
        matrix,
        bits=settings.bits,
        group_size=settings.group_size,
        asym=settings.asym,
        search="mse",
        importance=None if inputs is None else inputs.mean_square,
    )
