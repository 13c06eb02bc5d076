"""From the tensors of a .lut file to the decoder in the core."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tmac_py import _core
from tmac_py.errors import ModelFileError
from tmac_py.lutfile import LutFile
from tmac_py.packing import open_linear
from tmac_py.spec import Tables

if TYPE_CHECKING:  # types that the core itself does not hold
    from tmac_py._core import (
        FeedForwardBias,
        FeedForwardTensors,
        LayerTensors,
        OptionalTensor,
    )

_OPTIONAL: dict[OptionalTensor, str] = {
    "attn_sub_norm": "self_attn.attn_sub_norm.weight",
    "ffn_sub_norm": "mlp.ffn_sub_norm.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_bias": "self_attn.o_proj.bias",
    "router": "mlp.gate.weight",
}
"""Tensors that only some families have: name in the core -> name in a layer."""

_QK_NORMS: dict[OptionalTensor, str] = {
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
_FULL_QK_NORMS: dict[OptionalTensor, str] = {
    "q_full_norm": "self_attn.q_norm.weight",
    "k_full_norm": "self_attn.k_norm.weight",
}

_FEED_FORWARD_BIASES: dict[FeedForwardBias, str] = {
    "gate_bias": "gate_proj.bias",
    "up_bias": "up_proj.bias",
    "down_bias": "down_proj.bias",
}

_OUT_NORMS: dict[OptionalTensor, str] = {
    "attention_out_norm": "post_attention_layernorm.weight",
    "feed_forward_out_norm": "post_feedforward_layernorm.weight",
}
"""The same with ``out_norms``: in other families the first of these names is another norm."""


def build_decoder(file: LutFile, tables: Tables) -> _core.Decoder:
    """The C++ decoder over the mapped tensors of ``file``, which it keeps alive.

    With tied embeddings embed_tokens and lm_head are one object.

    Raises:
        ModelFileError: a tensor does not fit the core.
    """
    config = file.config

    def linear(name: str) -> _core.Linear:
        packed, spec = file.linear(f"{name}.weight")
        try:
            return open_linear(packed, spec, file.order(f"{name}.weight"))
        except ValueError as error:
            raise ModelFileError(f"{file.path}: tensor {name}.weight: {error}") from error

    shapes = config.tensor_shapes()

    def feed_forward(module: str) -> FeedForwardTensors:
        result: FeedForwardTensors = {
            "gate_proj": linear(f"{module}.gate_proj"),
            "up_proj": linear(f"{module}.up_proj"),
            "down_proj": linear(f"{module}.down_proj"),
        }
        for key, name in _FEED_FORWARD_BIASES.items():
            if f"{module}.{name}" in shapes:
                result[key] = file.float(f"{module}.{name}")
        return result

    def layer(index: int) -> LayerTensors:
        prefix = f"model.layers.{index}."
        result: LayerTensors = {
            "input_norm": file.float(f"{prefix}input_layernorm.weight"),
            "feed_forward_norm": file.float(f"{prefix}{feed_forward_norm}.weight"),
            "q_proj": linear(f"{prefix}self_attn.q_proj"),
            "k_proj": linear(f"{prefix}self_attn.k_proj"),
            "v_proj": linear(f"{prefix}self_attn.v_proj"),
            "o_proj": linear(f"{prefix}self_attn.o_proj"),
            "feed_forwards": [
                feed_forward(prefix + module)
                for module in [f"mlp.experts.{i}" for i in range(config.experts_of(index))]
                or ["mlp"]
            ],
            "sliding_window": config.window_of(index),
            "rope": config.rope_of(index),
        }
        for key, name in optional.items():
            if prefix + name in shapes:
                result[key] = file.float(prefix + name)
        return result

    optional = _OPTIONAL | (_FULL_QK_NORMS if config.full_qk_norm else _QK_NORMS)
    feed_forward_norm = "post_attention_layernorm"
    if config.out_norms:
        feed_forward_norm = "pre_feedforward_layernorm"
        optional |= _OUT_NORMS
    embed_tokens = linear("model.embed_tokens")
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return _core.Decoder(
        embed_tokens=embed_tokens,
        lm_head=embed_tokens if config.tie_word_embeddings else linear("lm_head"),
        final_norm=file.float("model.norm.weight"),
        layers=[layer(i) for i in range(config.num_hidden_layers)],
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rotary_dim=config.rotary_dim,
        rms_norm_eps=config.rms_norm_eps,
        query_scalar=config.query_pre_attn_scalar or float(config.head_dim),
        attention_softcap=config.attn_logit_softcapping or 0.0,
        logits_softcap=config.final_logit_softcapping or 0.0,
        embedding_scale=config.embedding_scale,
        activation=config.hidden_act,
        clip_qkv=config.clip_qkv or 0.0,
        experts_per_token=config.num_experts_per_tok,
        normalize_experts=config.norm_topk_prob,
        ropes=[
            {
                "inv_freq": rope.inv_freq,
                "attention_scale": rope.attention_scale,
                "long_inv_freq": rope.long_inv_freq,
                "original_context": rope.original_context,
            }
            for rope in config.ropes()
        ],
        tables=tables,
        head_tables=_head_tables(file, f"{head}.weight", tables),
    )


def _head_tables(file: LutFile, head: str, tables: Tables) -> Tables:
    """In BitNet the inputs of its ternary matrices are rounded to 8 bits, those of others are not.

    Ma et al., 2024 (arXiv 2402.17764), section 2: lm_head is no BitLinear.
    """
    _, spec = file.linear(head)
    if tables == "exact8" and file.config.activation_bits == 8 and spec.encoding != "ternary":
        return "exact"
    return tables
