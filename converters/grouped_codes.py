"""What formats of codes with a scale and a zero point per group of columns have in common."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.checkpoint import as_float32
from tmac_py.converters.safetensors_file import StoredTensor
from tmac_py.converters.weight_format import FLOATS, Expected, Parts
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.quant import QuantTensor, resolve_group_size


def load_half(tensor: StoredTensor) -> NDArray[np.float16]:
    """The values rounded to fp16. Raises ValueError for those that fp16 cannot hold."""
    stored = as_float32(tensor.load())
    what = tensor.name.rpartition(".")[2]
    if not np.isfinite(stored).all():
        raise ValueError(f"{what} are not finite")
    with np.errstate(over="ignore"):
        rounded = stored.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise ValueError(f"{what}: {np.abs(stored).max():.4g} exceeds the largest fp16, 65504")
    return rounded


def grouped_tensor(
    codes: NDArray[np.uint8],
    scales: NDArray[np.float16],
    zeros: NDArray[Any] | float,
    *,
    bits: int,
    group_size: int,
    order: NDArray[np.int32] | None = None,
) -> QuantTensor:
    """The matrix ``scales * (codes - zeros)``.

    ``codes`` are ``[m, k]``, ``scales`` and ``zeros`` ``[m, groups]``. Zero points that are all
    the same become one number for the matrix.
    """
    group_size = resolve_group_size(codes.shape[1], group_size)
    scales = np.ascontiguousarray(scales)
    if isinstance(zeros, np.ndarray):
        if (zeros != zeros.flat[0]).any():
            offsets = np.ascontiguousarray(zeros, np.float16)
            return QuantTensor(codes, scales, offsets, bits, group_size, "zero", order=order)
        zeros = float(zeros.flat[0])
    return QuantTensor(codes, scales, None, bits, group_size, "none", zeros, order=order)


def column_order(
    groups: NDArray[Any], k: int, group_size: int, *, may_be_unset: bool
) -> NDArray[np.int32] | None:
    """The order that makes the columns of each group stand together, by the group of each column.

    None where they do. ``may_be_unset``: all columns in the first of several groups is what some
    tools write for that. Raises ValueError where no order gives groups of ``group_size``.
    """
    natural = np.arange(k) // group_size
    if np.array_equal(groups, natural) or (may_be_unset and not groups.any()):
        return None
    if groups.min() < 0 or groups.max() > natural[-1]:
        raise ValueError(
            f"g_idx must lie from 0 to {natural[-1]}, found {groups.min()} to {groups.max()}"
        )
    order = np.argsort(groups, kind="stable").astype(np.int32)
    if not np.array_equal(groups[order], natural):
        raise ValueError(f"g_idx must give {group_size} columns to each group but the last")
    return order


def bias_expected(m: int, parts: Parts) -> dict[str, Expected]:
    """A bias, which some tools write for every module, if there is one."""
    return {"bias": Expected((m,), FLOATS)} if "bias" in parts else {}


def refuse_bias(parts: Parts) -> None:
    """Raise ValueError for a bias that is not zero, where the architecture has none."""
    if "bias" in parts and as_float32(parts["bias"].load()).any():
        raise ValueError("it has a bias, which this architecture does not")


def whole_number(settings: Mapping[str, Any], *keys: str, default: int | None = None) -> int:
    """The value of the first of ``keys`` that is there. Raises ModelFileError for others."""
    found = [settings[key] for key in keys if settings.get(key) is not None]
    value = found[0] if found else default
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelFileError(
            f"quantisation settings: {keys[0]} must be an integer, found {reprlib.repr(value)}"
        )
    return value


def check_group_size(group_size: int) -> int:
    """``group_size`` if a .lut can hold it. Raises UnsupportedError."""
    if group_size != -1 and (group_size < 4 or group_size % 4):
        raise UnsupportedError(
            f"group_size {group_size} is not supported (a multiple of 4, or -1 for the whole row)"
        )
    return group_size


def matches(pattern: str, module: str) -> bool:
    """Whether a regular expression fits the beginning of ``module``.

    Raises ModelFileError for one that is not valid.
    """
    try:
        return re.match(pattern, module) is not None
    except re.error as error:
        raise ModelFileError(f"quantisation settings: pattern {pattern!r}: {error}") from error
