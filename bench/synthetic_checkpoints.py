"""Checkpoints of random numbers in the shapes of a model, for measuring conversions."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf_config import add_config
from numpy.typing import NDArray

from tmac_py.config import ModelConfig
from tmac_py.converters.safetensors_file import DTYPES

GROUP = 128
SHARD_BYTES = 2 << 30

_TILE = 1 << 20  # numbers that are made; tensors repeat them
_HEADS = ("model.embed_tokens.weight", "lm_head.weight")

Part = tuple[str, tuple[int, ...]]
"""safetensors dtype and shape."""

Parts = Callable[[int, int], dict[str, Part]]
"""The tensors that store a matrix [m, k], by what follows the name of its module."""

_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True}


def _gptq(bits: int, act_order: bool) -> tuple[dict[str, Any], Parts]:
    def parts(m: int, k: int) -> dict[str, Part]:
        groups = k // GROUP
        return {
            "qweight": ("I32", (k * bits // 32, m)),
            "qzeros": ("I32", (groups, m * bits // 32)),
            "scales": ("F16", (groups, m)),
            "g_idx": ("I32", (k,)),
        }

    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": act_order}
    return settings, parts


def _awq(m: int, k: int) -> dict[str, Part]:
    return {
        "qweight": ("I32", (k, m // 8)),
        "qzeros": ("I32", (k // GROUP, m // 8)),
        "scales": ("F16", (k // GROUP, m)),
    }


def _bitnet(m: int, k: int) -> dict[str, Part]:
    return {"weight": ("U8", (m // 4, k)), "weight_scale": ("BF16", (1,))}


FOLDERS: dict[str, tuple[dict[str, Any] | None, Parts]] = {
    "bf16": (None, lambda m, k: {"weight": ("BF16", (m, k))}),
    "gptq4": _gptq(4, act_order=False),
    "gptq4-act-order": _gptq(4, act_order=True),
    "gptq3": _gptq(3, act_order=False),
    "gptq2": _gptq(2, act_order=False),
    "awq": (_AWQ, _awq),
    "bitnet": (
        {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"},
        _bitnet,
    ),
}
"""Kind -> quantization_config and how matrices are stored."""

GGUF_HALVES = {
    "Q4_0": (0,),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q4_K": (0, 2),
    "Q6_K": (208,),
    "TQ2_0": (64,),
}
"""GGUF type -> where the fp16 numbers stand in a block."""

KINDS = (*FOLDERS, *GGUF_HALVES)


def write_checkpoint(kind: str, config: ModelConfig, folder: Path) -> Path:
    """Write a checkpoint of one of `KINDS` into an empty folder; what `convert` takes.

    Matrices over the vocabulary are bf16 in folders of safetensors, of the type itself in GGUF.
    """
    if kind in GGUF_HALVES:
        return _write_gguf(kind, config, folder / "model.gguf")
    settings, parts_of = FOLDERS[kind]
    tensors: dict[str, Part] = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1 or name in _HEADS:
            tensors[name] = ("BF16", shape)
        else:
            module = name.removesuffix("weight")
            parts = parts_of(shape[0], shape[1])
            tensors.update({module + part: entry for part, entry in parts.items()})
    hf = config.to_dict() | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    hf["eos_token_id"] = hf.pop("eos_token_ids")
    hf.pop("architecture")
    if settings is not None:
        hf["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(hf))
    _write_shards(tensors, folder, bool(settings and settings.get("desc_act")))
    return folder


def _write_shards(tensors: dict[str, Part], folder: Path, act_order: bool) -> None:
    shards: list[dict[str, Part]] = [{}]
    size = 0
    for name, part in tensors.items():
        size += _nbytes(part)
        if size > SHARD_BYTES:
            shards.append({})
            size = _nbytes(part)
        shards[-1][name] = part
    numbers = _Numbers(act_order)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file_name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map.update(dict.fromkeys(shard, file_name))
        header: dict[str, Any] = {}
        end = 0
        for name, (dtype, shape) in shard.items():
            start, end = end, end + _nbytes((dtype, shape))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for name, part in shard.items():
                _write_repeated(file, numbers.of(name, part), _nbytes(part))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class _Numbers:
    """What tensors are filled with."""

    def __init__(self, act_order: bool) -> None:
        self._rng = np.random.default_rng(0)
        self._act_order = act_order
        normal = self._rng.normal(0, 0.02, _TILE).astype(np.float32)
        self._bf16 = (normal.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        self._scales = self._rng.uniform(0.001, 0.002, _TILE).astype(np.float16)
        self._words = self._rng.integers(0, 2**32, _TILE, np.uint32)
        trits = self._rng.integers(0, 3, (_TILE, 4), np.uint8)
        self._trits: NDArray[np.uint8] = trits @ np.array([1, 4, 16, 64], np.uint8)

    def of(self, name: str, part: Part) -> NDArray[Any]:
        """Numbers to repeat until the tensor is full."""
        if name.endswith("g_idx"):
            groups = np.arange(part[1][0], dtype=np.int32) // GROUP
            return self._rng.permutation(groups) if self._act_order else groups
        if name.endswith("weight_scale"):
            return np.array([0x4200], np.uint16)  # 32, the inverse of a mean |w|
        numbers: dict[str, NDArray[Any]] = {
            "BF16": self._bf16,
            "F16": self._scales,
            "I32": self._words,
            "U8": self._trits,
        }
        return numbers[part[0]]


def _nbytes(part: Part) -> int:
    return math.prod(part[1]) * np.dtype(DTYPES[part[0]]).itemsize


def _write_repeated(file: BinaryIO, tile: NDArray[Any], nbytes: int) -> None:
    data = tile.view(np.uint8).data
    for start in range(0, nbytes, data.nbytes):
        file.write(data[: nbytes - start])


def _write_gguf(kind: str, config: ModelConfig, path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    add_config(writer, config)
    type_of = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[type_of]
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (_TILE // block, nbytes), np.uint8)
    for start in GGUF_HALVES[kind]:
        d = rng.normal(0, 0.002, len(tile)).astype(np.float16)
        tile[:, start : start + 2] = d[:, None].view(np.uint8)
    if kind == "TQ2_0":  # code 3 is not one
        tile[:, :64] = rng.integers(0, 3, (len(tile), 64, 4), np.uint8) @ np.array(
            [1, 4, 16, 64], np.uint8
        )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for ours, shape in config.tensor_shapes().items():
        name = names.get_name(ours, (".weight",)) or ours
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            row_bytes = shape[1] // block * nbytes
            data = np.resize(tile.reshape(-1), (shape[0], row_bytes))
            writer.add_tensor(name, data, raw_dtype=type_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
