"""compressed-tensors "pack-quantized", as llm-compressor writes it.

``weight_packed`` I32 ``[m, words]`` holds codes along k, ``weight_scale`` is ``[m, groups]``,
``weight_zero_point`` I32 ``[words, groups]`` holds zero points along m (old versions: I8
``[m, groups]``), ``weight_g_idx`` ``[k]`` the group of each column, ``weight_shape`` is ``[m, k]``.
Codes and zero points are signed, stored plus ``2**(bits - 1)``.

A word holds ``32 // bits`` codes in old versions; in new ones codes may cross words, which differs
for 3, 5, 6 and 7 bits and shows in the number of words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.bit_fields import unpack_fields
from tmac_py.converters.checkpoint import Shape
from tmac_py.converters.grouped_codes import (
    bias_expected,
    check_group_size,
    column_order,
    grouped_tensor,
    load_half,
    matches,
    refuse_bias,
    whole_number,
)
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
from tmac_py.quant import MAX_BITS, QuantTensor, count_groups, resolve_group_size

_PACKED = "pack-quantized"
_INTEGERS = ("I32", "I64")


@dataclass(frozen=True)
class PackQuantized:
    """One way to store modules: see WeightFormat."""

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool = False

    dense = False

    def expected(self, shape: Shape, parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat. ``weight_g_idx`` and ``bias`` may be missing."""
        m, k = shape
        groups = count_groups(k, resolve_group_size(k, self.group_size))
        straddle = self._straddles(shape, parts)
        result = {
            "weight_packed": Expected((m, self._words(k, straddle)), ("I32",)),
            "weight_scale": Expected((m, groups), FLOATS),
            "weight_shape": Expected((2,), _INTEGERS),
        }
        if not self.symmetric:
            plain = "weight_zero_point" in parts and parts["weight_zero_point"].dtype == "I8"
            words = m if plain else self._words(m, straddle)
            result["weight_zero_point"] = Expected((words, groups), ("I8",) if plain else ("I32",))
        if "weight_g_idx" in parts:
            result["weight_g_idx"] = Expected((k,), _INTEGERS)
        return {**result, **bias_expected(m, parts)}

    def load(self, shape: Shape, parts: Parts) -> QuantTensor:
        """See WeightFormat."""
        m, k = shape
        refuse_bias(parts)
        stated = parts["weight_shape"].load().tolist()
        if stated != [m, k]:
            raise ValueError(f"weight_shape is {stated}, must be {[m, k]}")
        group_size = resolve_group_size(k, self.group_size)
        order = None
        if "weight_g_idx" in parts:
            groups = parts["weight_g_idx"].load()
            unset = bool((groups == -1).all())
            order = None if unset else column_order(groups, k, group_size, may_be_unset=False)
        straddle = self._straddles(shape, parts)
        words = parts["weight_packed"].load()
        return grouped_tensor(
            unpack_fields(words, self.bits, k, straddle=straddle, order=order),
            load_half(parts["weight_scale"]),
            self._zeros(m, parts, straddle),
            bits=self.bits,
            group_size=group_size,
            order=order,
        )

    def _zeros(self, m: int, parts: Parts, straddle: bool) -> NDArray[Any] | float:
        middle = 1 << (self.bits - 1)
        if self.symmetric:
            return float(middle)
        tensor = parts["weight_zero_point"]
        if tensor.dtype == "I8":
            zeros: NDArray[np.int16] = tensor.load().astype(np.int16) + np.int16(middle)
            if zeros.min() < 0 or zeros.max() >= 1 << self.bits:
                raise ValueError(f"weight_zero_point does not fit in {self.bits} bits")
            return zeros
        columns: NDArray[Any] = unpack_fields(tensor.load().T, self.bits, m, straddle=straddle).T
        return columns

    def _words(self, n: int, straddle: bool) -> int:
        return -(-n * self.bits // 32) if straddle else -(-n // (32 // self.bits))

    def _straddles(self, shape: Shape, parts: Parts) -> bool:
        """Whether fields are stored as new versions do it, by the number of words."""
        m, k = shape
        counts = [(k, "weight_packed", 1)]
        if "weight_zero_point" in parts and parts["weight_zero_point"].dtype == "I32":
            counts.append((m, "weight_zero_point", 0))
        for n, name, axis in counts:
            old = self._words(n, straddle=False)
            if old != self._words(n, straddle=True):
                found = parts[name].shape if name in parts else ()
                return len(found) != 2 or found[axis] != old
        if 32 % self.bits and any(n > 32 // self.bits for n, _, _ in counts):
            raise UnsupportedError(
                f"a matrix {[m, k]} of {self.bits} bits takes as many words in each version of "
                "compressed-tensors, which store it differently; there is no telling which"
            )
        return True


def compressed_tensors_formats(settings: Mapping[str, Any]) -> FormatOf:
    """The format of each module by the settings of llm-compressor.

    Raises UnsupportedError or ModelFileError for settings that cannot be read.
    """
    name = settings.get("format")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise ModelFileError("quantisation settings: config_groups must be an object of objects")
    for key in ("kv_cache_scheme", "transform_config"):
        if settings.get(key):
            raise UnsupportedError(f"compressed-tensors with a {key} is not supported")
    sparsity = settings.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedError(
            f"compressed-tensors with {sparsity['format']!r} sparsity is not supported"
        )
    by_target: list[tuple[str, PackQuantized]] = []
    for group in groups.values():
        weights = _format_of_group(group, name)
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise ModelFileError("quantisation settings: targets must be a list of names")
        by_target += [(target, weights) for target in targets]
    by_target.sort(key=lambda entry: entry[0] == "Linear")  # the class: after names

    def of_module(module: str, parts: Parts) -> WeightFormat:
        if is_dense(parts):
            return DENSE
        for target, weights in by_target:
            if _is_target(target, module):
                return replace(weights, ordered="weight_g_idx" in parts)
        return DENSE

    return of_module


def _is_target(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return matches(target.removeprefix("re:"), module)
    return target in ("Linear", module)


def _format_of_group(group: Mapping[str, Any], general: object) -> PackQuantized:
    name = group.get("format") or general
    if name != _PACKED:
        raise UnsupportedError(f"compressed-tensors format {name!r} is not supported ({_PACKED})")
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise ModelFileError("quantisation settings: each group needs weights")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise UnsupportedError(f"compressed-tensors with {key} is not supported (null)")
    if (kind := weights.get("type", "int")) != "int":
        raise UnsupportedError(f"compressed-tensors weights of type {kind!r} (only int)")
    bits = whole_number(weights, "num_bits")
    if not 1 <= bits <= MAX_BITS:
        raise UnsupportedError(f"compressed-tensors with {bits} bits (1 to {MAX_BITS})")
    strategy = weights.get("strategy")
    if strategy not in ("group", "channel"):
        raise UnsupportedError(
            f"compressed-tensors strategy {strategy!r} is not supported (group, channel)"
        )
    group_size = whole_number(weights, "group_size") if strategy == "group" else -1
    return PackQuantized(bits, check_group_size(group_size), bool(weights.get("symmetric", True)))
