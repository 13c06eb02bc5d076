"""GPTQ as AutoGPTQ, GPTQModel and AutoRound store it.

Codes and zero points are streams of bits in int32 words: ``qweight`` ``[k * bits / 32, m]`` along
k, ``qzeros`` ``[groups, m * bits / 32]`` along m; ``scales`` are ``[groups, m]``, and ``g_idx``
``[k]`` is the group of each column, which act-order does not leave in a row.
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
from tmac_py.quant import QuantTensor, count_groups, resolve_group_size

_BITS = (2, 3, 4, 8)
_WORD_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""bits -> a word with 1 in each field."""


@dataclass(frozen=True)
class Gptq:
    """One way to store modules: see WeightFormat.

    ``one_less``: zero points are stored less 1 (version 1 of the format).
    """

    bits: int
    group_size: int
    one_less: bool
    act_order: bool = False
    ordered: bool = False

    dense = False

    def expected(self, shape: Shape, parts: Parts) -> Mapping[str, Expected]:
        """See WeightFormat. ``g_idx`` and ``bias`` may be missing."""
        m, k = shape
        groups = count_groups(k, resolve_group_size(k, self.group_size))
        result = {
            "qweight": Expected((self._words(k), m), ("I32",)),
            "qzeros": Expected((groups, self._words(m)), ("I32",)),
            "scales": Expected((groups, m), FLOATS),
        }
        if "g_idx" in parts:
            result["g_idx"] = Expected((k,), ("I32", "I64"))
        return {**result, **bias_expected(m, parts)}

    def load(self, shape: Shape, parts: Parts) -> QuantTensor:
        """See WeightFormat."""
        m, k = shape
        refuse_bias(parts)
        group_size = resolve_group_size(k, self.group_size)
        order = None
        if "g_idx" in parts:
            groups = parts["g_idx"].load()
            order = column_order(groups, k, group_size, may_be_unset=not self.act_order)
        return grouped_tensor(
            unpack_fields(parts["qweight"].load().T, self.bits, k, order=order),
            load_half(parts["scales"]).T,
            self._zeros(parts["qzeros"].load(), m).T,
            bits=self.bits,
            group_size=group_size,
            order=order,
        )

    def _words(self, n: int) -> int:
        return -(-n * self.bits // 32)

    def _zeros(self, words: NDArray[Any], m: int) -> NDArray[np.uint8]:
        """``[groups, m]``. Writers subtract 1 from all fields of a word at once: a borrow that a
        field of 0 takes from its neighbour goes back when 1 is added likewise. Fields of other
        numbers of bits, which cross words, are counted down one by one."""
        if not self.one_less:
            return unpack_fields(words, self.bits, m)
        if self.bits in _WORD_ONES:
            with np.errstate(over="ignore"):
                words = words.view(np.uint32) + np.uint32(_WORD_ONES[self.bits])
            return unpack_fields(words, self.bits, m)
        fields = unpack_fields(words, self.bits, m)
        fields += np.uint8(1)
        fields &= np.uint8((1 << self.bits) - 1)
        return fields


def gptq_formats(settings: Mapping[str, Any]) -> FormatOf:
    """The format of each module by the settings that AutoGPTQ and GPTQModel write.

    Raises UnsupportedError or ModelFileError for settings that cannot be read.
    """
    name = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if settings.get("is_marlin_format"):
        name = "marlin"
    if name not in ("gptq", "gptq_v2"):
        raise UnsupportedError(f"GPTQ format {name!r} is not supported (gptq, gptq_v2)")
    if (words := settings.get("pack_dtype") or "int32") != "int32":
        raise UnsupportedError(f"GPTQ pack_dtype {words!r} is not supported (int32)")
    general = gptq_format(settings, one_less=name == "gptq")
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ModelFileError("quantisation settings: dynamic must be an object")

    def of_module(module: str, parts: Parts) -> WeightFormat:
        if is_dense(parts):
            return DENSE
        for pattern, changes in dynamic.items():
            if matches(pattern.removeprefix("+:").removeprefix("-:"), module):
                if pattern.startswith("-:"):
                    return DENSE
                return _of_parts(gptq_format(changes, base=general), parts)
        return _of_parts(general, parts)

    return of_module


def gptq_format(
    settings: object,
    *,
    base: Gptq | None = None,
    one_less: bool = False,
    allowed: tuple[int, ...] = _BITS,
) -> Gptq:
    """The format that settings describe; of a module, what they leave out is as in ``base``."""
    if not isinstance(settings, dict):
        raise ModelFileError("quantisation settings: an object is needed for each pattern")
    bits = whole_number(settings, "bits", default=base.bits if base else None)
    if bits not in allowed:
        raise UnsupportedError(f"GPTQ with {bits} bits is not supported {allowed}")
    group_size = whole_number(settings, "group_size", default=base.group_size if base else -1)
    return Gptq(
        bits,
        check_group_size(group_size),
        base.one_less if base else one_less,
        bool(settings.get("desc_act", base.act_order if base else False)),
    )


def _of_parts(weights: Gptq, parts: Parts) -> Gptq:
    return replace(weights, ordered="g_idx" in parts)
