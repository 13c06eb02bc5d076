"""Matrices of 8-bit floats (e4m3, e5m2) with scales per tensor, row or block.

Micikevicius et al., 2022 (arXiv 2209.05433), table 1; e4m3 is the variant without infinities, which
PyTorch calls float8_e4m3fn. Scales multiply, also those named ``weight_scale_inv``: they are the
inverse of what the weights were multiplied with. Scales of activations are not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.checkpoint import Shape, as_float32
from tmac_py.converters.weight_format import DENSE, FLOATS, Expected, FormatOf, Parts, WeightFormat
from tmac_py.errors import UnsupportedError
from tmac_py.quant import MatrixLike

_SCALES = ("weight_scale_inv", "weight_scale")
_UNUSED = ("input_scale", "activation_scale")
_DEFAULT_BLOCK = (128, 128)


def _table(exponent_bits: int, *, infinities: bool) -> NDArray[np.float32]:
    """The numbers that the 256 bytes stand for."""
    mantissa_bits = 7 - exponent_bits
    byte = np.arange(256)
    exponent = byte >> mantissa_bits & (1 << exponent_bits) - 1
    fraction = (byte & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    bias = (1 << exponent_bits - 1) - 1
    values = np.where(
        exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias)
    )
    if infinities:
        top = exponent == (1 << exponent_bits) - 1
        values[top] = np.where(fraction[top] == 0, np.inf, np.nan)
    else:
        values[byte & 0x7F == 0x7F] = np.nan
    return np.where(byte & 0x80, -values, values).astype(np.float32)


TABLES = {"F8_E4M3": _table(4, infinities=False), "F8_E5M2": _table(5, infinities=True)}
"""safetensors dtype -> float32 ``[256]``."""


def fp8_formats(settings: Mapping[str, Any]) -> FormatOf:
    """The FormatOf of a quantization_config whose quant_method is "fp8" or "fbgemm_fp8".

    Raises UnsupportedError for settings that make no sense.
    """
    block = settings.get("weight_block_size") or list(_DEFAULT_BLOCK)
    whole = isinstance(block, list) and all(type(size) is int and size > 0 for size in block)
    if not whole or len(block) != len(_DEFAULT_BLOCK):
        raise UnsupportedError(f"weight_block_size {block!r} is not supported (two sizes)")
    weights = Fp8((block[0], block[1]))

    def format_of(_module: str, parts: Parts) -> WeightFormat:
        has_floats = "weight" in parts and parts["weight"].dtype in FLOATS
        return DENSE if has_floats else weights

    return format_of


def compressed_fp8_formats(settings: Mapping[str, Any]) -> FormatOf | None:
    """The FormatOf of a quantization_config of compressed-tensors; None for other than e4m3."""
    groups = settings.get("config_groups")
    weights: list[Mapping[str, Any]] = []
    for group in groups.values() if isinstance(groups, dict) else ():
        stated = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(stated, dict):
            return None
        if (stated.get("type"), stated.get("num_bits")) != ("float", 8):
            return None
        weights.append(stated)
    if not weights:
        return None
    blocks = [w["block_structure"] for w in weights if w.get("block_structure")]
    if any(block != blocks[0] for block in blocks):
        raise UnsupportedError(f"blocks of several sizes are not supported: {blocks}")
    return fp8_formats({"weight_block_size": blocks[0] if blocks else None})


@dataclass(frozen=True)
class Fp8:
    """``weight`` ``[m, k]`` and its scales: one, ``[m]``, ``[m, 1]`` or one per ``block``."""

    block: tuple[int, int]
    dense = True
    ordered = False

    def expected(self, shape: Shape, parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat."""
        name = next((name for name in _SCALES if name in parts), _SCALES[0])
        blocks = self._blocks(shape)
        stored = parts[name].shape if name in parts else blocks
        fitting = stored in ((), (1,), (1, 1), (shape[0],), (shape[0], 1), blocks)
        return {
            "weight": Expected(shape, tuple(TABLES)),
            name: Expected(stored if fitting else blocks, FLOATS),
            **{part: Expected(parts[part].shape, FLOATS) for part in _UNUSED if part in parts},
        }

    def load(self, shape: Shape, parts: Parts) -> MatrixLike:
        """See WeightFormat."""
        tensor = next(parts[name] for name in _SCALES if name in parts)
        scales = as_float32(tensor.load())
        if not np.isfinite(scales).all():
            raise ValueError(f"{tensor.name} is not finite")
        if scales.size == 1:
            block, scales = (shape[0], shape[1]), scales.reshape(1, 1)
        elif scales.shape == self._blocks(shape):
            block = self.block
        else:
            block, scales = (1, shape[1]), scales.reshape(-1, 1)
        weight = parts["weight"]
        return Fp8Matrix(weight.load(), TABLES[weight.dtype], scales, block)

    def _blocks(self, shape: Shape) -> Shape:
        return (-(-shape[0] // self.block[0]), -(-shape[1] // self.block[1]))


@dataclass(frozen=True)
class Fp8Matrix:
    """Rows of bytes ``[m, k]``, as float32 numbers times the scales of their blocks when sliced."""

    stored: NDArray[np.uint8]
    table: NDArray[np.float32]
    scales: NDArray[np.float32]
    block: tuple[int, int]

    @property
    def shape(self) -> Shape:
        """``(m, k)``."""
        return self.stored.shape

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        m, k = self.shape
        values = self.table[self.stored[rows]]
        scales = self.scales[np.arange(m)[rows] // self.block[0]]
        with np.errstate(over="ignore", invalid="ignore"):
            values *= np.repeat(scales, self.block[1], axis=1)[:, :k]
        return values
