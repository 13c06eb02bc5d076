"""A small checkpoint of every family of formats, and ways to break its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import quantised_writers as write
import test_fp8
import test_lora
from quantised_writers import Matrix, Tensors, random_matrix
from test_bitnet import Golden
from tiny_checkpoints import TINY, gguf_tensors, hf_config, random_weights, write_gguf, write_hf

SMALL = replace(
    TINY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    head_dim=16,
)
UP = "model.layers.0.mlp.up_proj"


@dataclass(frozen=True)
class Family:
    """``build`` makes the checkpoint in a folder and returns the arguments of tmac-convert that
    name it. ``weights`` is the file of weights by its path in that folder, ``scales`` the tensor in
    it whose first number a test spoils, to the harm of ``matrix``, ``stored`` one whose dtype it
    changes."""

    build: Callable[[Path], list[str]]
    scales: str
    stored: str
    weights: str = "m/model.safetensors"
    matrix: str = f"{UP}.weight"


def _coded(
    settings: dict[str, Any],
    writer: Callable[[Matrix], Tensors],
    bits: int,
    *,
    act_order: bool = False,
) -> Callable[[Path], list[str]]:
    def build(path: Path) -> list[str]:
        rng = np.random.default_rng(0)
        tensors: dict[str, NDArray[Any]] = dict(random_weights(SMALL))
        for name in list(tensors):
            if "_proj" in name:
                m, k = tensors.pop(name).shape
                w = random_matrix(rng, m, k, bits=bits, group_size=32, act_order=act_order)
                module = name.removesuffix(".weight")
                tensors.update({f"{module}.{part}": t for part, t in writer(w).items()})
        config = hf_config(SMALL, quantization_config=settings)
        return [str(write_hf(path / "m", tensors, config, dtype=None))]

    return build


def _dense(path: Path) -> list[str]:
    return [str(write_hf(path / "m", random_weights(SMALL), hf_config(SMALL), dtype="F16"))]


def _gguf(path: Path) -> list[str]:
    tensors = gguf_tensors(random_weights(SMALL), SMALL, "Q4_0")
    return [str(write_gguf(path / "m.gguf", SMALL, tensors))]


def _lora(path: Path) -> list[str]:
    base, adapter, _ = test_lora.folders(path, "plain")
    return [str(base), "--lora", str(adapter)]


FAMILIES: dict[str, Family] = {
    "dense": Family(_dense, f"{UP}.weight", f"{UP}.weight"),
    "gptq": Family(
        _coded(write.gptq_settings(4, 32, desc_act=True), write.gptq, 4, act_order=True),
        f"{UP}.scales",
        f"{UP}.qweight",
    ),
    "awq": Family(
        _coded(write.awq_settings(32, "gemm"), write.awq_gemm, 4), f"{UP}.scales", f"{UP}.qzeros"
    ),
    "compressed-tensors": Family(
        _coded(write.packed_settings(3, 32, symmetric=False), write.pack_quantized, 3),
        f"{UP}.weight_scale",
        f"{UP}.weight_packed",
    ),
    "hqq": Family(
        _coded({"quant_method": "hqq"}, lambda w: write.hqq(w, w.zeros.astype(np.float16)), 4),
        f"{UP}.scale",
        f"{UP}.W_q",
    ),
    "bitnet": Family(
        lambda path: [str(Golden("llama-packed").folder(path / "m"))],
        f"{UP}.weight_scale",
        f"{UP}.weight",
    ),
    "fp8": Family(
        lambda path: [str(test_fp8.folder(path / "m"))], f"{UP}.weight_scale", f"{UP}.weight"
    ),
    "gguf": Family(_gguf, "blk.0.ffn_up.weight", "blk.0.ffn_up.weight", "m.gguf"),
    "lora": Family(_lora, test_lora.A, test_lora.A, "plain/adapter_model.safetensors", test_lora.Q),
}

_BYTES = {"F16": "<f2", "F32": "<f4", "BF16": "<u2"}
_OTHER_DTYPE = {
    "F16": "U16",
    "BF16": "I16",
    "F32": "U32",
    "I32": "F32",
    "U8": "I8",
    "F8_E4M3": "U8",
}
"""dtypes of the same size, which no reader takes in such a place."""


def _header(data: bytes) -> tuple[int, dict[str, Any]]:
    start = 8 + int.from_bytes(data[:8], "little")
    return start, json.loads(data[8:start])


def set_number(path: Path, name: str, value: float) -> None:
    """Write ``value`` over the first number of a tensor of floats of a safetensors file."""
    data = bytearray(path.read_bytes())
    start, header = _header(data)
    at, dtype = start + header[name]["data_offsets"][0], header[name]["dtype"]
    if dtype == "BF16":
        raw = (np.array([value], "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        raw = np.array([value], _BYTES[dtype]).tobytes()
    data[at : at + len(raw)] = raw
    path.write_bytes(data)


def set_dtype(path: Path, name: str) -> None:
    """Have the header of a safetensors file give a tensor another dtype of the same size."""
    data = path.read_bytes()
    start, header = _header(data)
    header[name]["dtype"] = _OTHER_DTYPE[header[name]["dtype"]]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
