"""What each ``general.architecture`` of a GGUF file means for ModelConfig and for tensor names.

Keys and tensor names are those of llama.cpp (gguf-py, constants.py); what its graphs take for
granted (llama-model.cpp) is stated here. Norms of Gemma are stored as factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tmac_py.converters.gguf_container import Metadata
from tmac_py.errors import UnsupportedError
from tmac_py.families import ATTENTION

_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_SUB_NORMS = {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}
_OUT_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        names: parts of tensor names -> parts of Hugging Face names, where not as for "llama".
        interleaved: whether the halves of every head of q and k alternate, row by row.
        fields: metadata -> fields of ModelConfig beyond those of all.
        has_experts: whether layers have several feed-forwards, each kind of matrix in one tensor.
        partly_turned: whether RoPE may turn a part of the head.
        ternary: whether the matrices of layers are ternary in whatever type they are stored, and
            their inputs rounded to 8 bits.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    interleaved: bool = False
    fields: Callable[[Metadata], dict[str, Any]] = lambda _metadata: {}
    has_experts: bool = False
    partly_turned: bool = False
    ternary: bool = False


def _llama(metadata: Metadata) -> dict[str, Any]:
    return {"sliding_window": metadata.get("llama.attention.sliding_window", int, 0)}


def _smollm3(metadata: Metadata) -> dict[str, Any]:
    """Each fourth layer has no RoPE."""
    layers = _layers(metadata, "smollm3")
    return {"layers_without_rope": tuple(range(3, layers, 4))}


def _qwen3moe(metadata: Metadata) -> dict[str, Any]:
    return {
        **_experts(metadata, "qwen3moe", "expert_feed_forward_length"),
        "qk_norm": True,
        "norm_topk_prob": True,
    }


def _olmoe(metadata: Metadata) -> dict[str, Any]:
    return {**_experts(metadata, "olmoe", "feed_forward_length"), "full_qk_norm": True}


def _experts(metadata: Metadata, name: str, width: str) -> dict[str, Any]:
    return {
        "num_experts": metadata.get(f"{name}.expert_count", int),
        "num_experts_per_tok": metadata.get(f"{name}.expert_used_count", int),
        "moe_intermediate_size": metadata.get(f"{name}.{width}", int),
    }


def _phi3(metadata: Metadata) -> dict[str, Any]:
    """llama.cpp leaves the window out; transformers and the models' makers do not."""
    return {"sliding_window": metadata.get("phi3.attention.sliding_window", int, 0)}


def _bitnet(_metadata: Metadata) -> dict[str, Any]:
    """1bitLLM's models."""
    return {"sub_norms": True}


def _bitnet_2b(_metadata: Metadata) -> dict[str, Any]:
    """BitNet b1.58 2B-4T (bitnet.cpp's llama.cpp)."""
    return {"sub_norms": True, "hidden_act": "relu2"}


def _gemma2(metadata: Metadata) -> dict[str, Any]:
    """Every other layer has a window."""
    return {
        **_gemma(metadata, "gemma2", layers_of_27b=46),
        **_windows(metadata, "gemma2", period=2),
        "attn_logit_softcapping": metadata.get("gemma2.attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": metadata.get("gemma2.final_logit_softcapping", float, 30.0),
    }


def _gemma3(metadata: Metadata) -> dict[str, Any]:
    """Each sixth layer has no window."""
    fields = _gemma(metadata, "gemma3", layers_of_27b=62)
    if (cap := metadata.find("gemma3.final_logit_softcapping", float)) is not None:
        fields["final_logit_softcapping"] = cap
    return {
        **fields,
        **_windows(metadata, "gemma3", period=6),
        "qk_norm": True,
        "rope_local_base_freq": metadata.get("gemma3.rope.freq_base_swa", float, 10000.0),
    }


def _gemma(metadata: Metadata, name: str, *, layers_of_27b: int) -> dict[str, Any]:
    hidden = metadata.get(f"{name}.embedding_length", int)
    fields: dict[str, Any] = {
        "out_norms": True,
        "hidden_act": "gelu_pytorch_tanh",
        "embedding_scale": float(np.float32(math.sqrt(hidden))),
    }
    if _layers(metadata, name) == layers_of_27b:
        heads = metadata.get(f"{name}.attention.head_count", int)
        fields["query_pre_attn_scalar"] = float(hidden // max(heads, 1))
    return fields


def _windows(metadata: Metadata, name: str, *, period: int) -> dict[str, Any]:
    layers = _layers(metadata, name)
    if f"{name}.attention.sliding_window_pattern" in metadata:
        raise UnsupportedError(
            f"metadata key {name}.attention.sliding_window_pattern is not supported"
        )
    return {
        "sliding_window": metadata.get(f"{name}.attention.sliding_window", int, 4096),
        "full_attention_layers": tuple(range(period - 1, layers, period)),
    }


def _layers(metadata: Metadata, name: str) -> int:
    return min(metadata.get(f"{name}.block_count", int), 4096)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(interleaved=True, fields=_llama),
    "qwen2": Architecture(fields=lambda _: {"biases": ATTENTION[:3]}),
    "qwen3": Architecture(_QK_NORMS, fields=lambda _: {"qk_norm": True}),
    "qwen3moe": Architecture({**_QK_NORMS, **_ROUTER}, fields=_qwen3moe, has_experts=True),
    "olmoe": Architecture({**_QK_NORMS, **_ROUTER}, fields=_olmoe, has_experts=True),
    "smollm3": Architecture(interleaved=True, fields=_smollm3),
    "phi3": Architecture(_FUSED, fields=_phi3, partly_turned=True),
    "bitnet": Architecture(_SUB_NORMS, fields=_bitnet, ternary=True),
    "bitnet-25": Architecture(_SUB_NORMS, fields=_bitnet_2b, ternary=True),
    "bitnet-b1.58": Architecture(_SUB_NORMS, fields=_bitnet_2b, ternary=True),
    "gemma2": Architecture(_OUT_NORMS, fields=_gemma2),
    "gemma3": Architecture({**_OUT_NORMS, **_QK_NORMS}, fields=_gemma3),
}
"""``general.architecture`` -> what it means."""
