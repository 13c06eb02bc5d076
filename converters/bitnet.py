"""BitNet b1.58 in Hugging Face folders: packed trits, unpacked ones, and master weights.

Ma et al., 2024 (arXiv 2402.17764), section 2; transformers, integrations/bitnet.py: `pack_weights`,
`BitLinear`, `AutoBitLinear`. Every matrix has one scale, and the inputs of all matrices are rounded
to 8 bits per token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core
from tmac_py.converters.checkpoint import FloatMatrix, Shape, as_float32
from tmac_py.converters.safetensors_file import StoredTensor
from tmac_py.converters.weight_format import DENSE, FLOATS, Expected, FormatOf, Parts, WeightFormat
from tmac_py.errors import UnsupportedError
from tmac_py.parallel import map_threads
from tmac_py.quant import MatrixLike, QuantTensor, quantize_ternary, row_chunks, ternary_tensor

_NAME = re.compile(r"[\w.]+")
_PER_BYTE = 4
_CHUNK_ELEMENTS = 1 << 19
"""Weights that one thread works on at once."""

_PLAUSIBLE_INVERSE = 3.0
"""Means of |w| are below this, their inverses above: what settings that do not say which of the two
is stored are checked against."""


def bitnet_formats(settings: Mapping[str, Any]) -> FormatOf:
    """The FormatOf of a quantization_config whose quant_method is "bitnet".

    Raises UnsupportedError for settings that are not known.
    """
    if settings.get("use_rms_norm"):
        raise UnsupportedError("norms inside of the linear modules (use_rms_norm) cannot be run")
    linear_class = settings.get("linear_class", "bitlinear")
    mode = settings.get("quantization_mode", "offline")
    if linear_class not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise UnsupportedError(
            f"linear_class {linear_class!r} with quantization_mode {mode!r} is not supported "
            "(bitlinear, or autobitlinear with offline or online)"
        )
    kept = settings.get("modules_to_not_convert")
    if kept is None:
        kept = ["lm_head"]
    if not isinstance(kept, list) or not all(
        isinstance(name, str) and _NAME.fullmatch(name) for name in kept
    ):
        raise UnsupportedError(
            f"modules_to_not_convert {kept!r} is not supported (a list of names, no patterns)"
        )
    weights: WeightFormat
    if linear_class == "bitlinear":
        weights = Packed(inverse=True, stated="linear_class" in settings)
    else:
        weights = MASTER if mode == "online" else Packed(inverse=False)

    def format_of(module: str, parts: Parts) -> WeightFormat:
        if any(_names(name, module) for name in kept):
            return DENSE
        if isinstance(weights, Packed) and _is_unpacked(parts) and not weights.inverse:
            return UNPACKED
        return weights

    return format_of


def master_formats(module: str, _parts: Parts) -> WeightFormat:
    """The FormatOf of 1bitLLM's checkpoints, which have no quantization_config."""
    return DENSE if module == "lm_head" else MASTER


@dataclass(frozen=True)
class Packed:
    """``weight`` uint8 ``[m / 4, k]``: bits 2i and 2i + 1 are row ``i * m / 4 + r``, plus one.

    ``weight_scale`` is the scale, or its ``inverse``; ``stated`` tells whether settings say which.
    """

    inverse: bool
    stated: bool = True
    dense = False
    ordered = False

    def expected(self, shape: Shape, parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat."""
        m, k = shape
        return {"weight": Expected((-(-m // _PER_BYTE), k), ("U8",)), **_expected_scale(parts)}

    def load(self, shape: Shape, parts: Parts) -> QuantTensor:
        """See WeightFormat."""
        stored = _stored_scale(parts)
        if self.inverse and not self.stated and stored < _PLAUSIBLE_INVERSE:
            raise ValueError(
                f"weight_scale {stored:.6g} is small for an inverse of mean |w|, and config.json "
                'does not say that it is one: its quantization_config needs "linear_class", '
                '"bitlinear" for the inverse or "autobitlinear" for the mean'
            )
        packed, m = parts["weight"].load(), shape[0]
        codes = np.empty(shape, np.uint8)

        def unpack(part: slice) -> None:
            fields = _core.unpack_runs(packed[part], shape[1], 8 // _PER_BYTE)
            fields = fields.reshape(-1, _PER_BYTE, shape[1])
            for i in range(_PER_BYTE):
                first = i * len(packed)
                rows = codes[first + part.start : min(first + part.stop, m)]
                rows[:] = fields[: len(rows), i]

        map_threads(unpack, row_chunks(len(packed), shape[1] * _PER_BYTE, _CHUNK_ELEMENTS))
        return ternary_tensor(codes, 1 / stored if self.inverse else stored)


class Unpacked:
    """Floats -1, 0 and 1 in ``weight`` ``[m, k]``, the scale in ``weight_scale``."""

    dense = False
    ordered = False

    def expected(self, shape: Shape, parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat."""
        return {"weight": Expected(shape, FLOATS), **_expected_scale(parts)}

    def load(self, shape: Shape, parts: Parts) -> QuantTensor:
        """See WeightFormat."""
        weights, codes = FloatMatrix(parts["weight"].load()), np.empty(shape, np.uint8)

        def encode(rows: slice) -> None:
            w = weights[rows]
            if not np.isin(w, (-1, 0, 1)).all():
                raise ValueError("weights beside a weight_scale must be -1, 0 or 1")
            codes[rows] = w + 1

        map_threads(encode, row_chunks(shape[0], shape[1], _CHUNK_ELEMENTS))
        return ternary_tensor(codes, _stored_scale(parts))


class Master:
    """Floats to round to -1, 0 and 1 times their mean magnitude."""

    dense = False
    ordered = False

    def expected(self, shape: Shape, _parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat."""
        return {"weight": Expected(shape, FLOATS)}

    def load(self, _shape: Shape, parts: Parts) -> QuantTensor:
        """See WeightFormat."""
        return quantize_ternary(FloatMatrix(parts["weight"].load()))


def exact_ternary(matrix: MatrixLike) -> QuantTensor:
    """Floats ``[m, k]`` -s, 0 and s. Raises ValueError for others."""
    m, k = matrix.shape
    chunks = list(row_chunks(m, k, _CHUNK_ELEMENTS))
    scale = max(map_threads(lambda rows: np.float32(np.abs(matrix[rows]).max()), chunks))
    if not np.isfinite(scale):
        raise ValueError("weights are not finite")
    codes = np.empty((m, k), np.uint8)

    def encode(rows: slice) -> None:
        w = matrix[rows]
        signs = np.sign(w)
        if not np.array_equal(signs * scale, w):
            raise ValueError("weights of a BitNet model must be -s, 0 and s for one s")
        codes[rows] = signs + 1

    map_threads(encode, chunks)
    return ternary_tensor(codes, float(scale))


UNPACKED = Unpacked()
MASTER = Master()


def _is_unpacked(parts: Parts) -> bool:
    return "weight" in parts and parts["weight"].dtype in FLOATS


def _names(name: str, module: str) -> bool:
    """Whether a name in modules_to_not_convert means a module: as its last part, or one around it.

    As transformers' `should_convert_module` has it, but for regular expressions.
    """
    return module.endswith(name) or f"{module}.".startswith(f"{name.rstrip('.')}.")


def _expected_scale(parts: Parts) -> Mapping[str, Expected]:
    scalar = "weight_scale" in parts and parts["weight_scale"].shape == ()
    return {"weight_scale": Expected(() if scalar else (1,), FLOATS)}


def _stored_scale(parts: Parts) -> float:
    tensor: StoredTensor = parts["weight_scale"]
    values: NDArray[np.float32] = as_float32(tensor.load()).reshape(-1)
    scale = float(values[0])
    if not np.finfo(np.float32).tiny <= scale <= 1 / np.finfo(np.float32).tiny:
        raise ValueError(f"weight_scale {scale:.6g} is not a positive number")
    return scale
