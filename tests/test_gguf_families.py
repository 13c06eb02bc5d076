"""GGUF files of other architectures than llama: the same model as a Hugging Face folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_checkpoints import gguf_name, interleave, write_gguf, write_hf
from tmac_py import Model
from tmac_py.config import ModelConfig
from tmac_py.converters import convert, open_checkpoint
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.families import FAMILIES
from tmac_py.quant import QuantTensor

Weights = dict[str, NDArray[np.float32]]

GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
FUSED = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
LONG, SHORT = ([1.5 + i / 8, 2.5, 3.0, 4.25] for i in (0, 4))
ROPE = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}


def fused(weights: Weights, config: ModelConfig) -> Weights:
    """q, k and v as one matrix, gate and up as another."""
    result = dict(weights)
    for layer in range(config.num_hidden_layers):
        for module, parts in (
            ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            prefix = f"model.layers.{layer}."
            rows = [result.pop(f"{prefix}{part}.weight") for part in parts]
            result[f"{prefix}{module}.weight"] = np.concatenate(rows)
    return result


def write(
    path: Path,
    name: str,
    config: ModelConfig,
    weights: Weights,
    experts: str = "F32",
    kind: str = "F32",
    **extra: Any,
) -> Path:
    """The model as llama.cpp's converter writes it; experts in a type of their own."""
    names = GEMMA if config.out_norms else {}
    if name == "phi3":
        weights = fused(weights, config)
        names = FUSED
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for tensor, w in weights.items():
        if ".experts." in tensor:
            continue
        n_heads = heads.get(tensor.split(".")[-2]) if name == "smollm3" else None
        stored = w if n_heads is None else interleave(w, n_heads)
        this = kind if stored.ndim == 2 else "F32"
        data = gguf.quants.quantize(stored, gguf.GGMLQuantizationType[this])
        tensors[gguf_name(tensor, names)] = (data, this)
    if name == "phi3":
        tensors |= {n: (np.array(values, np.float32), "F32") for n, values in ROPE.items()}
    for layer in range(config.num_hidden_layers if config.num_experts else 0):
        prefix = f"model.layers.{layer}.mlp.experts."
        for part in ("gate", "up", "down"):
            each = [weights[f"{prefix}{i}.{part}_proj.weight"] for i in range(config.num_experts)]
            stacked = gguf.quants.quantize(np.stack(each), gguf.GGMLQuantizationType[experts])
            tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = (stacked, experts)
    keys = {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": None,
        **extra,
    }
    metadata = {f"{name}.{key}": value for key, value in keys.items()}
    return write_gguf(path, config, tensors, metadata, architecture=name)


SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 7,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "tie_word_embeddings": False,
}
WINDOW = {"attention.sliding_window": 7}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2": ({}, {}),
    "qwen3": ({}, {}),
    "qwen3moe": (
        {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
        {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 32},
    ),
    "olmoe": (
        {"num_experts": 5, "num_experts_per_tok": 2},
        {"expert_count": 5, "expert_used_count": 2},
    ),
    "smollm3": ({}, {}),
    "phi3": (
        {
            "partial_rotary_factor": 0.5,
            "sliding_window": 7,
            "original_max_position_embeddings": 32,
            "rope_scaling": {"type": "longrope", "long_factor": LONG, "short_factor": SHORT},
        },
        {
            "attention.sliding_window": 7,
            "rope.dimension_count": 8,
            "rope.scaling.original_context_length": 32,
            "rope.scaling.attn_factor": math.sqrt(1 + math.log(2) / math.log(32)),
        },
    ),
    "gemma2": (
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "attn_logit_softcapping": 4.0,
            "tie_word_embeddings": True,
        },
        {**WINDOW, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        {
            "query_pre_attn_scalar": 16,
            "sliding_window": 7,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        {
            **WINDOW,
            "rope.freq_base_swa": 100.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 4.0,
        },
    ),
}
"""Keys of config.json, keys of the GGUF file."""


def both(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """The same random model as a folder and as a GGUF file."""
    keys, metadata = MODELS[name]
    model_type = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}.get(name, name)
    values = {"model_type": model_type, "architectures": ["XForCausalLM"], **SIZES, **keys}
    config = ModelConfig.from_hf(values)
    rng = np.random.default_rng(0)
    weights: Weights = {}
    for tensor, shape in config.tensor_shapes().items():
        if len(shape) == 2:
            weights[tensor] = rng.normal(0, 0.2, shape).astype(np.float32)
        else:  # 1 and less than 1 are exact in float32
            steps = rng.integers(-300, 300, shape) / 1024
            weights[tensor] = (steps + ("norm" in tensor)).astype(np.float32)
    offset = FAMILIES[model_type].norm_offset
    stored = {n: w - np.float32(offset) if "norm" in n else w for n, w in weights.items()}
    folder = write_hf(tmp_path / "hf", stored, values)
    return folder, write(tmp_path / "m.gguf", name, config, weights, **metadata)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_gguf_file_is_the_same_model_as_a_folder(tmp_path: Path, name: str) -> None:
    folder, file = both(tmp_path, name)
    ours, theirs = open_checkpoint(folder).config.to_dict(), open_checkpoint(file).config.to_dict()
    ours.pop("query_pre_attn_scalar", None)  # 16, which is head_dim: a GGUF file does not say it
    assert theirs == ours
    for source in (folder, file):
        convert(source, tmp_path / f"{source.name}.lut", bits=8, head_bits=8, group_size=32)
    ids = np.random.default_rng(1).integers(0, SIZES["vocab_size"], 40)
    with Model.load(tmp_path / "hf.lut") as a, Model.load(tmp_path / "m.gguf.lut") as b:
        assert np.array_equal(a.logits(ids), b.logits(ids))
        assert a.logits(ids).std() > 0.1


def test_lists_of_factors(tmp_path: Path) -> None:
    keys, metadata = MODELS["phi3"]
    config = ModelConfig.from_hf({"model_type": "phi3", **SIZES, **keys})
    weights = {n: np.ones(s, np.float32) for n, s in config.tensor_shapes().items()}
    extra = {**metadata, "rope.scaling.attn_factor": 1.25}
    path = write(tmp_path / "m.gguf", "phi3", config, weights, **extra)
    scaling = open_checkpoint(path).config.rope_scaling
    assert scaling is not None
    assert (scaling["attention_factor"], scaling["factor"]) == (1.25, 2.0)
    assert (scaling["long_factor"], scaling["short_factor"]) == (LONG, SHORT)
    for change, text in (
        ({"rope.dimension_count": 12}, r"rope_factors_short\.weight F32\[4\]: F32\[6\] is needed"),
        ({"rope.dimension_count": 7}, r"rope_factors_short\.weight F32\[4\]: F32\[3\] is needed"),
        ({"rope.scaling.original_context_length": 1}, "must be an integer of at least 2"),
        ({"attention.head_count_kv": 4}, r"missing: blk\.0\.attn_q.* blk\.0\.attn_qkv\.weight \["),
    ):
        path = write(tmp_path / "m.gguf", "phi3", config, weights, **{**metadata, **change})
        with pytest.raises(ModelFileError, match=text):
            open_checkpoint(path)


def test_codes_of_fused_projections_are_kept(tmp_path: Path) -> None:
    keys, extra = MODELS["phi3"]
    config = ModelConfig.from_hf({"model_type": "phi3", **SIZES, **keys})
    rng = np.random.default_rng(0)
    weights = {
        n: rng.normal(0, 0.2, s).astype(np.float32) for n, s in config.tensor_shapes().items()
    }
    path = write(tmp_path / "m.gguf", "phi3", config, weights, kind="Q8_0", **extra)
    for tensor in open_checkpoint(path).tensors:
        if tensor.name.endswith(("q_proj.weight", "v_proj.weight", "up_proj.weight")):
            stored = tensor.load()
            again = gguf.quants.quantize(weights[tensor.name], gguf.GGMLQuantizationType.Q8_0)
            assert isinstance(stored, QuantTensor)
            assert np.array_equal(
                stored.dequantize(),
                gguf.quants.dequantize(again, gguf.GGMLQuantizationType.Q8_0),
            )


def test_settings_that_are_refused(tmp_path: Path) -> None:
    _, metadata = MODELS["gemma3"]
    config = ModelConfig.from_hf({"model_type": "gemma3_text", **SIZES})
    weights = {n: np.ones(s, np.float32) for n, s in config.tensor_shapes().items()}
    for extra, text in (
        ({"attention.sliding_window_pattern": 3}, "sliding_window_pattern is not supported"),
        ({"rope.dimension_count": 8}, r"gemma3\.rope\.dimension_count is 8: only the full head"),
    ):
        path = write(tmp_path / "m.gguf", "gemma3", config, weights, **{**metadata, **extra})
        with pytest.raises(UnsupportedError, match=text):
            open_checkpoint(path)


def test_codes_of_experts_are_kept(tmp_path: Path) -> None:
    keys, extra = MODELS["olmoe"]
    config = ModelConfig.from_hf({"model_type": "olmoe", **SIZES, **keys})
    rng = np.random.default_rng(0)
    weights = {
        n: rng.normal(0, 0.2, s).astype(np.float32) for n, s in config.tensor_shapes().items()
    }
    path = write(tmp_path / "m.gguf", "olmoe", config, weights, experts="Q8_0", **extra)
    tensors = {tensor.name: tensor for tensor in open_checkpoint(path).tensors}
    for part in ("gate", "up", "down"):
        for expert in (0, 4):
            name = f"model.layers.6.mlp.experts.{expert}.{part}_proj.weight"
            stored = tensors[name].load()
            alone = gguf.quants.quantize(weights[name], gguf.GGMLQuantizationType.Q8_0)
            again = gguf.quants.dequantize(alone, gguf.GGMLQuantizationType.Q8_0)
            assert isinstance(stored, QuantTensor)
            assert np.array_equal(stored.dequantize(), again)
