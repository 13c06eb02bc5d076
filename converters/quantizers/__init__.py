"""Quantisers of float matrices, by the names that ``tmac-convert --quant`` takes."""

from __future__ import annotations

from dataclasses import dataclass

from tmac_py.converters.quantizers.awq import fold_scales
from tmac_py.converters.quantizers.base import Inputs, Quantizer, Settings
from tmac_py.converters.quantizers.bcq import quantize_bcq
from tmac_py.converters.quantizers.gptq import quantize_gptq
from tmac_py.converters.quantizers.hqq import quantize_hqq
from tmac_py.converters.quantizers.rtn import quantize_minmax, quantize_mse

__all__ = ["METHODS", "Inputs", "Method", "Quantizer", "Settings", "fold_scales"]


@dataclass(frozen=True)
class Method:
    """A quantiser and what it needs.

    ``calibrated``: inputs of the matrices; the embedding has none and is quantised by
    ``alone``, if it is not the same.
    ``folds``: scales are folded into a layer first. ``offsets``: an offset per group always.
    ``binary``: binary-coded up to 4 bits. ``orders``: may put columns in another order.
    """

    quantize: Quantizer
    calibrated: bool = False
    alone: Quantizer | None = None
    folds: bool = False
    offsets: bool = False
    binary: bool = False
    orders: bool = False


METHODS: dict[str, Method] = {
    "rtn": Method(quantize_minmax),
    "mse": Method(quantize_mse),
    "hqq": Method(quantize_hqq, offsets=True),
    "bcq": Method(quantize_bcq, calibrated=True, offsets=True, binary=True, orders=True),
    "gptq": Method(quantize_gptq, calibrated=True, alone=quantize_mse, orders=True),
    "awq": Method(quantize_mse, calibrated=True, alone=quantize_mse, folds=True),
}
"""Name -> method."""
