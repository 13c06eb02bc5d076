"""Writers of tiny GGUF and safetensors checkpoints for the tests of the readers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tiny_vocab import byte_level_json
from tmac_py.config import ModelConfig
from tmac_py.converters.quantization_config import format_of
from tmac_py.converters.safetensors_file import read_header
from tmac_py.converters.weight_format import Parts, WeightFormat
from tmac_py.quant import MatrixLike, QuantTensor

TINY = ModelConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=40,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}

HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "IQ1_S": (0,),
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Where the fp16 numbers stand in a block."""


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Weights under Hugging Face names, about the size real ones have."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(1 if len(shape) == 1 else 0, 0.05, shape).astype(np.float32)
        for name, shape in config.tensor_shapes().items()
    }


def gguf_name(name: str, other: Mapping[str, str] | None = None) -> str:
    """``model.layers.0.mlp.up_proj.weight`` -> ``blk.0.ffn_up.weight``; ``other`` goes first."""
    names = {**GGUF_NAMES, **(other or {})}
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{names[part]}.{kind}"
    return f"{names[stem]}.{kind}"


def interleave(w: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows as llama.cpp's converter stores q and k: the halves of each head alternate."""
    halves = w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:])
    return np.asarray(halves.swapaxes(1, 2).reshape(w.shape))


def to_gguf_order(name: str, w: NDArray[Any], config: ModelConfig) -> NDArray[Any]:
    if name.endswith("q_proj.weight"):
        return interleave(w, config.num_attention_heads)
    if name.endswith("k_proj.weight"):
        return interleave(w, config.num_key_value_heads)
    return w


def random_blocks(
    shape: tuple[int, int], kind: str, seed: int, scales: tuple[float, ...] = ()
) -> NDArray[np.uint8]:
    """Rows of random blocks of a GGUF type; their fp16 numbers are ``scales`` or about as usual."""
    block, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (shape[0], shape[1] // block, nbytes), np.uint8)
    for start in HALVES.get(kind, ()):
        d = rng.choice(scales, raw.shape[:2]) if scales else rng.normal(0, 0.002, raw.shape[:2])
        raw[..., start : start + 2] = d.astype(np.float16)[..., None].view(np.uint8)
    if kind == "TQ2_0":  # code 3 is not one
        codes = rng.integers(0, 3, (*raw.shape[:2], 64, 4), np.uint8)
        raw[..., :64] = codes @ np.array([1, 4, 16, 64], np.uint8)
    return raw.reshape(shape[0], -1)


def encode(w: NDArray[np.float32], kind: str, seed: int = 0) -> NDArray[Any]:
    """Bytes of ``w`` in a GGUF type; valid random blocks where the gguf package writes none."""
    try:
        return gguf.quants.quantize(w, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        return random_blocks((w.shape[0], w.shape[1]), kind, seed)


def encode_i2_s(codes: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """The bytes of an I2_S tensor of codes 0, 1, 2: 128 of them in 32 bytes, the first highest."""
    quarters = codes.reshape(-1, 4, 32)
    packed = np.zeros((len(quarters), 32), np.uint8)
    for i in range(4):
        packed |= quarters[:, i] << np.uint8(6 - 2 * i)
    tail = np.zeros(32, np.uint8)
    tail[:4] = np.array([scale], "<f4").view(np.uint8)
    return np.concatenate([packed.reshape(-1), tail])


def set_type(path: Path, name: str, type_id: int) -> Path:
    """Write another type id into the entry of a matrix of a GGUF file."""
    data = bytearray(path.read_bytes())
    at = data.index(name.encode()) + len(name) + 4 + 2 * 8
    data[at : at + 4] = type_id.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, tuple[NDArray[Any], str]],
    metadata: dict[str, Any] | None = None,
    *,
    architecture: str = "llama",
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> Path:
    """A GGUF file of GGUF names -> (stored array, type); ``metadata`` overrides or adds keys.

    ``shapes`` are for tensors whose bytes do not tell them.
    """
    writer = gguf.GGUFWriter(path, architecture)
    sizes = {
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "context_length": config.max_position_embeddings,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    values = {f"{architecture}.{key}": value for key, value in sizes.items()} | (metadata or {})
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, (data, kind) in tensors.items():
        shape = (shapes or {}).get(name)
        writer.add_tensor(name, data, shape, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(
    weights: dict[str, NDArray[np.float32]], config: ModelConfig, kind: str
) -> dict[str, tuple[NDArray[Any], str]]:
    """GGUF names -> (stored array, type): matrices as ``kind``, norms as F32."""
    stored = {}
    for seed, (name, w) in enumerate(weights.items()):
        this = kind if w.ndim == 2 else "F32"
        stored[gguf_name(name)] = (encode(to_gguf_order(name, w, config), this, seed), this)
    return stored


_KINDS = {"f": "F", "i": "I", "u": "U"}


def save_safetensors(path: Path, tensors: dict[str, NDArray[Any]], dtype: str | None) -> None:
    """A safetensors file written byte by byte; bfloat16 by cutting float32 in half.

    Without ``dtype`` every tensor keeps its own; uint16 is bfloat16.
    """
    header, data = {}, b""
    for name, w in tensors.items():
        if dtype == "BF16":
            raw = (np.ascontiguousarray(w, np.float32).view(np.uint32) >> 16).astype("<u2")
        elif dtype is not None:
            raw = w.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1"}[dtype])
        else:
            raw = w
        own = "BF16" if w.dtype == np.uint16 else f"{_KINDS[w.dtype.kind]}{w.dtype.itemsize * 8}"
        content = raw.tobytes()
        header[name] = {
            "dtype": dtype or own,
            "shape": list(w.shape),
            "data_offsets": [len(data), len(data) + len(content)],
        }
        data += content
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@dataclass(frozen=True)
class StoredModule:
    """One module of a quantised checkpoint and the format that its settings name."""

    weights: WeightFormat
    parts: Parts
    shape: tuple[int, ...]

    def load(self) -> QuantTensor | MatrixLike:
        """The matrix, after a look at the tensors."""
        expected = self.weights.expected(self.shape, self.parts)
        found = {name: tensor.shape for name, tensor in self.parts.items()}
        assert found == {name: wanted.shape for name, wanted in expected.items()}
        assert all(self.parts[name].dtype in wanted.dtypes for name, wanted in expected.items())
        return self.weights.load(self.shape, self.parts)


def open_module(
    folder: Path,
    settings: dict[str, Any],
    tensors: dict[str, NDArray[Any]],
    shape: tuple[int, ...],
    *,
    module: str = "model.layers.0.mlp.up_proj",
) -> StoredModule:
    """A module of these ``tensors``, by what follows its name, out of a file."""
    path = folder / "module.safetensors"
    save_safetensors(path, {f"{module}.{part}": w for part, w in tensors.items()}, None)
    parts = {name.removeprefix(f"{module}."): t for name, t in read_header(path).items()}
    formats = format_of(settings["quant_method"], settings)
    return StoredModule(formats(module, parts), parts, shape)


def hf_config(config: ModelConfig, **changes: Any) -> dict[str, Any]:
    """The config.json of a transformers-4 checkpoint."""
    values = config.to_dict()
    for key in ("architecture", "eos_token_ids", "rope_scaling", "bos_token_id"):
        values.pop(key)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
        **values,
        **changes,
    }


def write_hf(
    folder: Path,
    weights: dict[str, NDArray[Any]],
    config: dict[str, Any],
    *,
    dtype: str | None = "F32",
    shards: int = 1,
) -> Path:
    """A Hugging Face folder, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_safetensors(folder / "model.safetensors", weights, dtype)
        return folder
    names = list(weights)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[i::shards]}
        save_safetensors(folder / file, part, dtype)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


SPEAKING = replace(TINY, vocab_size=400)


def write_speaking(
    folder: Path, weights: dict[str, NDArray[np.float32]] | None = None, **changes: Any
) -> Path:
    """A Hugging Face folder of ``SPEAKING`` with a tokenizer; ``changes`` to its configuration."""
    config = replace(SPEAKING, **changes)
    write_hf(folder, random_weights(config) if weights is None else weights, hf_config(config))
    (folder / "tokenizer.json").write_bytes(byte_level_json())
    return folder
