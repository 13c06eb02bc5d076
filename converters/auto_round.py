"""AutoRound's own exports, which store modules as GPTQ, AWQ or compressed-tensors do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tmac_py.converters.awq import awq_formats
from tmac_py.converters.compressed_tensors import compressed_tensors_formats
from tmac_py.converters.gptq import Gptq, gptq_format
from tmac_py.converters.grouped_codes import matches, whole_number
from tmac_py.converters.weight_format import DENSE, FormatOf, Parts, WeightFormat, is_dense
from tmac_py.errors import ModelFileError, UnsupportedError

_ONE_LESS = {
    "auto_round:auto_gptq": True,
    "auto_round:gptq": True,
    "auto_round": False,
    "auto_round:gptqmodel": False,
}
"""packing_format -> whether zero points are stored less 1, for those laid out like GPTQ."""

_BITS = (2, 3, 4, 5, 6, 7, 8)
_DENSE_BITS = 16


def auto_round_formats(settings: Mapping[str, Any]) -> FormatOf:
    """The format of each module. Raises UnsupportedError or ModelFileError."""
    packing = str(settings.get("packing_format") or "auto_round:auto_gptq")
    if packing in ("auto_round:auto_awq", "auto_round:awq"):
        return awq_formats({**settings, "version": "gemm"})
    if packing == "auto_round:llm_compressor" and "config_groups" in settings:
        return compressed_tensors_formats(settings)
    if packing not in _ONE_LESS:
        known = ", ".join((*_ONE_LESS, "auto_round:auto_awq", "auto_round:llm_compressor"))
        raise UnsupportedError(f"AutoRound packing_format {packing!r} is not supported ({known})")
    if (kind := settings.get("data_type") or "int") != "int":
        raise UnsupportedError(f"AutoRound data_type {kind!r} is not supported (int)")
    general = gptq_format(dict(settings), one_less=_ONE_LESS[packing], allowed=_BITS)
    extra = settings.get("extra_config") or {}
    if not isinstance(extra, dict):
        raise ModelFileError("quantisation settings: extra_config must be an object")

    def of_module(module: str, parts: Parts) -> WeightFormat:
        if is_dense(parts):
            return DENSE
        changes = extra.get(module)
        if changes is None:
            changes = next((c for name, c in extra.items() if matches(f".*{name}", module)), {})
        if not isinstance(changes, dict):
            raise ModelFileError("quantisation settings: an object is needed for each pattern")
        if whole_number(changes, "bits", default=general.bits) >= _DENSE_BITS:
            return DENSE
        weights: Gptq = gptq_format(changes, base=general, allowed=_BITS)
        return replace(weights, ordered="g_idx" in parts)

    return of_module
