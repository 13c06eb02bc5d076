"""The decoder families: what each ``model_type`` of config.json means for ModelConfig.

The one place that names families. All of them run on one graph, whose optional steps are fields of
ModelConfig; a family says which of its keys set which of these fields (docs/families.md).
Definitions are those of transformers' modeling files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.json_values import integer, number, optional_number

Values = Mapping[str, Any]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """What one family differs by from Llama.

    Attributes:
        models: what it is known by.
        defaults: what transformers takes for keys that config.json lacks, where not as for all.
        fields: config.json and the number of layers -> fields of ModelConfig; raises
            UnsupportedError or ModelFileError.
        norm_offset: added to the weights of norms when a checkpoint is read.
        rope_types: names that the family has for others' types of rope scaling.
    """

    models: str
    defaults: Values = field(default_factory=dict)
    fields: Callable[[Values, int], dict[str, Any]] = lambda _config, _n_layers: {}
    norm_offset: float = 0.0
    rope_types: Mapping[str, str] = field(default_factory=dict)


def family_of(config: Values) -> Family:
    """The family of a config.json. Raises UnsupportedError for a model_type that is not known."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UnsupportedError(
            f"config.json: model_type {model_type!r} is not supported ({', '.join(FAMILIES)})"
        )
    return FAMILIES[model_type]


def is_1bitllm(config: Values) -> bool:
    """Models of 1bitLLM, which say "llama" and have norms that transformers' bitnet has as well."""
    return "BitnetForCausalLM" in (config.get("architectures") or [])


def _llama(config: Values, _n_layers: int) -> dict[str, Any]:
    return {**_biases(config), "sub_norms": is_1bitllm(config)}


def _mistral(config: Values, _n_layers: int) -> dict[str, Any]:
    """An absent window means 4096 there, null means none."""
    if config.get("sliding_window", 4096) is None:
        return {}
    return {"sliding_window": integer(config, "sliding_window", 4096)}


def _qwen2(config: Values, n_layers: int) -> dict[str, Any]:
    return {"biases": ATTENTION[:3], **_qwen_windows(config, n_layers)}


def _qwen3(config: Values, n_layers: int) -> dict[str, Any]:
    return {**_biases(config), "qk_norm": True, **_qwen_windows(config, n_layers)}


def _qwen3_moe(config: Values, n_layers: int) -> dict[str, Any]:
    """Layers with experts follow a period, less some that are named. A window is for all layers."""
    step = max(1, integer(config, "decoder_sparse_step", 1))
    only = config.get("mlp_only_layers") or []
    if not isinstance(only, list):
        raise ModelFileError("config.json: mlp_only_layers must be a list of layers")
    dense = tuple(i for i in range(n_layers) if i in only or (i + 1) % step)
    fields: dict[str, Any] = {**_attention_biases(config), "qk_norm": True}
    if config.get("use_sliding_window") and config.get("sliding_window", 4096) is not None:
        fields["sliding_window"] = integer(config, "sliding_window", 4096)
    experts = _experts(config, integer(config, "moe_intermediate_size", 768), 128)
    if experts["num_experts"] == 0 or len(dense) == n_layers:
        return fields
    return {**fields, **experts, "dense_layers": dense}


def _olmoe(config: Values, _n_layers: int) -> dict[str, Any]:
    return {
        **_attention_biases(config),
        **_experts(config, integer(config, "intermediate_size", 2048), 64),
        "full_qk_norm": True,
        "clip_qkv": optional_number(config, "clip_qkv", None),
    }


def _experts(config: Values, width: int, default: int) -> dict[str, Any]:
    """transformers 5 writes ``num_local_experts`` for some families."""
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    return {
        "num_experts": integer(config, key, default),
        "num_experts_per_tok": integer(config, "num_experts_per_tok", 8),
        "moe_intermediate_size": width,
        "norm_topk_prob": bool(config.get("norm_topk_prob")),
    }


def _qwen_windows(config: Values, n_layers: int) -> dict[str, Any]:
    """The upper layers have a window, if it is switched on."""
    if not config.get("use_sliding_window") or config.get("sliding_window", 4096) is None:
        return {}
    first = integer(config, "max_window_layers", 28)
    return _windows(config, n_layers, lambda layer: layer >= first)


def _smollm3(config: Values, n_layers: int) -> dict[str, Any]:
    """Layers without RoPE; only these may have a window."""
    turned = config.get("no_rope_layers")
    if turned is None:
        interval = max(1, integer(config, "no_rope_layer_interval", 4))
        turned = [int((layer + 1) % interval != 0) for layer in range(n_layers)]
    if not isinstance(turned, list) or len(turned) < n_layers:
        raise ModelFileError(f"config.json: no_rope_layers must list {n_layers} numbers")
    without = tuple(layer for layer in range(n_layers) if not turned[layer])
    windows = {}
    if config.get("use_sliding_window") and config.get("sliding_window") is not None:
        windows = _windows(config, n_layers, lambda layer: layer in without)
    return {**_biases(config), "layers_without_rope": without, **windows}


def _phi3(config: Values, _n_layers: int) -> dict[str, Any]:
    factor = _rope_of(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    fields: dict[str, Any] = {"partial_rotary_factor": number({"f": factor}, "f", 1.0)}
    if config.get("sliding_window") is not None:
        fields["sliding_window"] = integer(config, "sliding_window")
    return fields


def _gemma2(config: Values, n_layers: int) -> dict[str, Any]:
    """Every other layer has a window."""
    return {
        **_gemma(config),
        **_windows(config, n_layers, lambda layer: layer % 2 == 0),
        "attn_logit_softcapping": optional_number(config, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": optional_number(config, "final_logit_softcapping", 30.0),
    }


def _gemma3(config: Values, n_layers: int) -> dict[str, Any]:
    """All layers but each sixth have a window, and RoPE of another base.

    transformers hands no soft cap to attention here.
    """
    period = max(1, integer(config, "sliding_window_pattern", 6))
    local = _rope_of(config).get("sliding_attention") or {}
    if local.get("rope_type", "default") != "default":
        raise UnsupportedError(
            f"config.json: rope_type {local['rope_type']!r} of sliding_attention is not supported "
            "(default)"
        )
    base = local.get("rope_theta", config.get("rope_local_base_freq"))
    return {
        **_gemma(config),
        **_windows(config, n_layers, lambda layer: (layer + 1) % period != 0),
        "qk_norm": True,
        "rope_local_base_freq": number({"rope_local_base_freq": base}, "rope_local_base_freq", 1e4),
        "final_logit_softcapping": optional_number(config, "final_logit_softcapping", None),
    }


def _gemma(config: Values) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise UnsupportedError("config.json: use_bidirectional_attention is not supported")
    scale = math.sqrt(integer(config, "hidden_size"))
    return {
        **_biases(config),
        "out_norms": True,
        "hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh",
        "embedding_scale": _rounded(scale, config.get("dtype") or config.get("torch_dtype")),
        "query_pre_attn_scalar": number(config, "query_pre_attn_scalar", 256.0),
    }


def _rounded(value: float, dtype: object) -> float:
    """``value`` as a number of the weights' dtype, to which transformers rounds it."""
    single = np.float32(value)
    if dtype == "float16":
        return float(np.float16(single))
    if dtype != "bfloat16":
        return float(single)
    bits = int(single.view(np.uint32))
    bits += 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
    return float(np.uint32(bits & 0xFFFF0000).view(np.float32))


def _biases(config: Values) -> dict[str, Any]:
    feed_forward = FEED_FORWARD if config.get("mlp_bias") else ()
    return {"biases": (*_attention_biases(config)["biases"], *feed_forward)}


def _attention_biases(config: Values) -> dict[str, Any]:
    return {"biases": ATTENTION if config.get("attention_bias") else ()}


def _bitnet(config: Values, _n_layers: int) -> dict[str, Any]:
    return {**_attention_biases(config), "sub_norms": True}


def _windows(config: Values, n_layers: int, slides: Callable[[int], bool]) -> dict[str, Any]:
    """Fields for the window of some layers: those of ``layer_types``, else where ``slides``."""
    kinds = config.get("layer_types")
    if kinds is None:
        sliding = [slides(layer) for layer in range(n_layers)]
    else:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) < n_layers or set(map(str, kinds)) - {*known}:
            raise UnsupportedError(
                f"config.json: layer_types must list {n_layers} of {', '.join(known)}"
            )
        sliding = [kind == "sliding_attention" for kind in kinds[:n_layers]]
    if not any(sliding):
        return {}
    return {
        "sliding_window": integer(config, "sliding_window", 4096),
        "full_attention_layers": tuple(i for i, slide in enumerate(sliding) if not slide),
    }


def _rope_of(config: Values) -> Values:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return rope if isinstance(rope, Mapping) else {}


_GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("Llama 2 to 3.2, SmolLM2, TinyLlama, Falcon3, 1bitLLM, HF1BitLLM", {}, _llama),
    "mistral": Family("Mistral", {"num_key_value_heads": 8}, _mistral),
    "qwen2": Family("Qwen2, Qwen2.5", {"max_position_embeddings": 32768}, _qwen2),
    "qwen3": Family("Qwen3", {"head_dim": 128, "max_position_embeddings": 32768}, _qwen3),
    "qwen3_moe": Family(
        "Qwen3 mixture of experts",
        {"num_key_value_heads": 4, "max_position_embeddings": 32768},
        _qwen3_moe,
    ),
    "olmoe": Family("OLMoE", {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}, _olmoe),
    "smollm3": Family(
        "SmolLM3",
        {
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        _smollm3,
    ),
    "phi3": Family(
        "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
        {
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        _phi3,
        rope_types={"su": "longrope", "yarn": "longrope"},
    ),
    "gemma2": Family("Gemma 2", _GEMMA, _gemma2, norm_offset=1.0),
    "gemma3_text": Family(
        "Gemma 3 (text)",
        {
            **_GEMMA,
            "num_attention_heads": 8,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "rope_theta": 1e6,
        },
        _gemma3,
        norm_offset=1.0,
    ),
    "bitnet": Family(
        "BitNet b1.58 2B-4T",
        {
            "num_key_value_heads": 5,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "relu2",
        },
        _bitnet,
    ),
}
"""``model_type`` in config.json -> family."""

MODEL_TYPES: Sequence[str] = tuple(FAMILIES)
