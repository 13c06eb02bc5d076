"""HQQ as the hqq package encodes it in safetensors: codes, float zero points, settings as tensors.

The matrix is cut into groups: with ``axis`` 1 the rows of ``reshape(-1, group_size)``, which are
stored one below the other with ``scale`` and ``zero`` ``[groups, 1]``. ``W_q`` holds several blocks
of groups on top of each other, the first in the highest bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tmac_py.converters.checkpoint import Shape
from tmac_py.converters.grouped_codes import (
    bias_expected,
    grouped_tensor,
    load_half,
    refuse_bias,
)
from tmac_py.converters.safetensors_file import DTYPES, StoredTensor
from tmac_py.converters.weight_format import (
    DENSE,
    FLOATS,
    Expected,
    FormatOf,
    Parts,
    WeightFormat,
    is_dense,
)
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.parallel import map_threads
from tmac_py.quant import QuantTensor, row_chunks

_SETTINGS = (
    "nbits",
    "group_size",
    "axis",
    "shape",
    "packing",
    "unpack_view_dtype",
    "view_as_float",
    "quant_scale",
    "quant_zero",
    "compute_dtype",
    "offload_meta",
    "encoded_state_dict",
    "stores_quant_config",
    "channel_wise",
    "optimize",
    "round_zero",
)
"""Tensors that hold a setting."""

_FIELDS = {8: (np.uint8, 1), 6: (np.uint8, 1), 5: (np.uint8, 1), 4: (np.uint8, 2)} | {
    3: (np.int32, 10),
    2: (np.uint8, 4),
    1: (np.uint8, 8),
}
"""bits -> type of what codes are packed into, and how many of them; 5 and 6 have a byte each."""

_CHUNK_WEIGHTS = 1 << 17
"""Weights that one thread unpacks at once."""


@dataclass(frozen=True)
class Hqq:
    """One way to store modules: see WeightFormat."""

    bits: int
    group_size: int  # -1: the whole row

    dense = False
    ordered = False

    def expected(self, shape: Shape, parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat. Settings and ``bias`` may be missing."""
        m, k = shape
        group_size = self._group_size(k)
        groups = m * k // group_size
        _, per_word = _FIELDS[self.bits]
        rows, columns, dtype = -(-groups // per_word), group_size, "I32" if self.bits == 3 else "U8"
        if "W_q" in parts and parts["W_q"].dtype in FLOATS:  # its bits, seen as floats
            size = np.dtype(DTYPES[parts["W_q"].dtype]).itemsize
            columns = columns * np.dtype(DTYPES[dtype]).itemsize // size
            dtype = parts["W_q"].dtype
        result = {
            "W_q": Expected((rows, columns), (dtype,)),
            "scale": Expected((groups, 1), FLOATS),
            "zero": Expected((groups, 1), FLOATS),
        }
        for name in _SETTINGS:
            if name in parts:
                result[name] = Expected(parts[name].shape, (parts[name].dtype,))
        return {**result, **bias_expected(m, parts)}

    def load(self, shape: Shape, parts: Parts) -> QuantTensor:
        """See WeightFormat."""
        m, k = shape
        refuse_bias(parts)
        if "shape" in parts and (stated := parts["shape"].load().tolist()) != [m, k]:
            raise ValueError(f"shape is {stated}, must be {[m, k]}")
        group_size = self._group_size(k)
        kind, per_word = _FIELDS[self.bits]
        words = np.ascontiguousarray(parts["W_q"].load()).view(kind)
        field_bits = 8 // per_word if kind is np.uint8 else self.bits
        fields = np.empty((per_word, *words.shape), np.uint8)

        def unpack(rows: slice) -> None:
            for i in range(per_word):
                shift = kind(field_bits * (per_word - 1 - i))
                fields[i, rows] = words[rows] >> shift & kind((1 << field_bits) - 1)

        map_threads(unpack, row_chunks(len(words), group_size * per_word, _CHUNK_WEIGHTS))
        groups = m * k // group_size
        return grouped_tensor(
            fields.reshape(-1, group_size)[:groups].reshape(m, k),
            load_half(parts["scale"]).reshape(m, -1),
            load_half(parts["zero"]).reshape(m, -1),
            bits=self.bits,
            group_size=group_size,
        )

    def _group_size(self, k: int) -> int:
        group_size = k if self.group_size == -1 else self.group_size
        if k % group_size:
            raise UnsupportedError(
                f"HQQ groups of {group_size} reach from one row of {k} weights into the next, "
                "which is not supported"
            )
        return group_size


def hqq_formats(settings: Mapping[str, Any]) -> FormatOf:
    """The format of each module by the settings of HQQ; those stored with the module win.

    Raises ModelFileError for settings that cannot be read.
    """
    general = settings.get("quant_config") or settings
    if not isinstance(general, dict):
        raise ModelFileError("quantisation settings: quant_config must be an object")

    def of_module(module: str, parts: Parts) -> WeightFormat:
        if is_dense(parts):
            return DENSE
        given = _given(general, module)
        bits, axis = (_needed(name, parts, given) for name in ("nbits", "axis"))
        group_size = _setting("group_size", parts, given)
        if axis != 1:
            raise UnsupportedError(
                f"HQQ with axis {axis:g} is not supported (1): its groups run across rows, "
                "those of a .lut along them"
            )
        for name in ("quant_scale", "quant_zero"):
            if name in parts and _number(parts[name]):
                raise UnsupportedError(f"HQQ with {name} is not supported")
        if bits not in _FIELDS:
            raise UnsupportedError(f"HQQ with {bits:g} bits is not supported (1 to 6, 8)")
        size = -1 if group_size is None else int(group_size)
        if size != -1 and (size < 4 or size % 4):
            raise UnsupportedError(f"HQQ group_size {size} is not a multiple of 4")
        return Hqq(int(bits), size)

    return of_module


def _given(general: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """weight_quant_params of a module: those of all, or of the modules of its name."""
    for part in (module.rpartition(".")[2], ".".join(module.split(".")[-2:])):
        if isinstance(general.get(part), dict):
            general = general[part]
    params = general.get("weight_quant_params", general)
    return params if isinstance(params, dict) else {}


def _needed(name: str, parts: Parts, given: Mapping[str, Any]) -> float:
    value = _setting(name, parts, given)
    if value is None:
        raise ModelFileError(f"HQQ: {name} stands neither with the module nor in the settings")
    return value


def _setting(name: str, parts: Parts, given: Mapping[str, Any]) -> float | None:
    if name in parts:
        return _number(parts[name])
    value = given.get(name)
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise ModelFileError(f"quantisation settings: {name} must be a number, found {value!r}")
    return value


def _number(tensor: StoredTensor) -> float:
    values = tensor.load()
    if values.size != 1 or values.dtype.kind not in "iuf":
        raise ModelFileError(f"tensor {tensor.name}: one number is needed")
    return float(values.reshape(-1)[0])
