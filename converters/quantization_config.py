"""The quantisation settings of a Hugging Face folder, and the format that they name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tmac_py.converters.auto_round import auto_round_formats
from tmac_py.converters.awq import awq_formats
from tmac_py.converters.bitnet import bitnet_formats
from tmac_py.converters.compressed_tensors import compressed_tensors_formats
from tmac_py.converters.fp8 import compressed_fp8_formats, fp8_formats
from tmac_py.converters.gptq import gptq_formats
from tmac_py.converters.hqq import hqq_formats
from tmac_py.converters.json_file import read_object
from tmac_py.converters.weight_format import DENSE, FormatOf, Parts, WeightFormat
from tmac_py.errors import ModelFileError, UnsupportedError

Settings = Mapping[str, Any]


def _compressed_tensors(settings: Settings) -> FormatOf:
    return compressed_fp8_formats(settings) or compressed_tensors_formats(settings)


METHODS: dict[str, Callable[[Settings], FormatOf]] = {
    "auto-round": auto_round_formats,
    "awq": awq_formats,
    "bitnet": bitnet_formats,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": fp8_formats,
    "fp8": fp8_formats,
    "gptq": gptq_formats,
    "hqq": hqq_formats,
    "intel/auto-round": auto_round_formats,
}
"""``quant_method`` -> what reads such settings. Raises UnsupportedError or ModelFileError."""

_REASONS = {
    "bitsandbytes": "its NF4 and FP4 codes are not evenly spaced, so a .lut cannot keep them, nor "
    "its int8 with outliers aside; the fp16 or bf16 checkpoint can be converted to 4 bits instead",
}
"""Methods that are known and refused, and why."""

_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": None,
}
"""Where settings stand if not in config.json, and the method whose tools write such a file."""


def read_settings(path: Path, config: Mapping[str, Any]) -> tuple[str, Settings] | None:
    """``quant_method`` and settings of the folder whose config.json holds ``config``.

    None for a checkpoint that is not quantised. Raises ModelFileError for settings without method.
    """
    file, method = "config.json", None
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings:
        found = [name for name in _FILES if (path / name).is_file()]
        if not found:
            return None
        file = found[0]
        settings, method = read_object(path / file), _FILES[file]
    if not isinstance(settings, dict):
        raise ModelFileError(f"{file}: quantization_config must be an object")
    method = settings.get("quant_method") or settings.get("method") or method
    if not isinstance(method, str):
        raise ModelFileError(f"{file}: quant_method must name the method, found {method!r}")
    return method.lower(), settings


def format_of(method: str, settings: Settings) -> FormatOf:
    """The format of each module. Raises UnsupportedError for methods that are not known."""
    if method in _REASONS:
        raise UnsupportedError(f"quant_method {method!r} is not supported: {_REASONS[method]}")
    if method not in METHODS:
        known = ", ".join(sorted(METHODS))
        raise UnsupportedError(
            f"quant_method {method!r} is not supported ({known}); "
            "the fp32, fp16 or bf16 checkpoint is an alternative, or a GGUF file"
        )
    return METHODS[method](settings)


def all_dense(_module: str, _parts: Parts) -> WeightFormat:
    """The FormatOf of checkpoints that are not quantised."""
    return DENSE
