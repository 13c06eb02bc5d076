"""config.json of transformers -> the fields of ModelConfig."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.families import Family, family_of, is_1bitllm
from tmac_py.json_values import integer, number
from tmac_py.rope import normalize_rope_scaling

_SCALED_FROM = ("dynamic", "llama3", "longrope", "yarn")
"""Types of rope scaling that know the length of the original context."""


def read_fields(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    """See ModelConfig.from_hf."""
    family = family_of(config)
    _refuse_other_heads(config)
    given = {**family.defaults, **{k: v for k, v in config.items() if v is not None}}
    heads = integer(given, "num_attention_heads")
    hidden = integer(given, "hidden_size")
    layers = integer(given, "num_hidden_layers")
    context = integer(given, "max_position_embeddings", 2048)
    rope = _rope_settings(config, family)
    theta = rope.get("rope_theta") or config.get("rope_theta")
    if theta is None:
        theta = given.get("rope_theta", 10000.0)
    eos = (generation_config or {}).get("eos_token_id")
    if eos is None:
        eos = config.get("eos_token_id")
    fields = {
        "hidden_size": hidden,
        "intermediate_size": integer(given, "intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": integer(given, "num_key_value_heads", heads),
        "head_dim": integer(given, "head_dim", hidden // max(heads, 1)),
        "vocab_size": integer(given, "vocab_size"),
        "rms_norm_eps": number(given, "rms_norm_eps", 1e-6),
        "rope_theta": number({"rope_theta": theta}, "rope_theta"),
        "max_position_embeddings": context,
        "tie_word_embeddings": bool(given.get("tie_word_embeddings", False)),
        "hidden_act": given.get("hidden_act", "silu"),
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        "activation_bits": _activation_bits(config),
        **family.fields(config, min(layers, 4096)),
    }
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        rope.pop("partial_rotary_factor", None)
    fields["rope_scaling"] = normalize_rope_scaling(rope, max_position_embeddings=context)
    return fields


def _refuse_other_heads(config: Mapping[str, Any]) -> None:
    stated = config.get("architectures") or []
    names = [str(name) for name in (stated if isinstance(stated, list) else [stated])]
    if names and not any(name.endswith("ForCausalLM") for name in names):
        raise UnsupportedError(
            f"config.json: architecture {names[0]} is not supported "
            "(LlamaForCausalLM and other ...ForCausalLM)"
        )


def _activation_bits(config: Mapping[str, Any]) -> int | None:
    """8 for BitNet b1.58: by its quantisation settings, or 1bitLLM's own keys."""
    if is_1bitllm(config):
        if (bits := config.get("input_bits", 8)) != 8:
            raise UnsupportedError(f"config.json: input_bits {bits!r} is not supported (8)")
        return 8
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return 8 if method == "bitnet" else None


def _rope_settings(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """``rope_parameters`` or ``rope_scaling``, with what some checkpoints keep beside them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if isinstance(rope, Mapping) and "full_attention" in rope:  # one for each type of layer
        rope = rope["full_attention"] or {}
    if not isinstance(rope, Mapping):
        raise ModelFileError(
            f"config.json: rope_scaling must be null or an object, found {reprlib.repr(rope)}"
        )
    result = {"partial_rotary_factor": config.get("partial_rotary_factor"), **rope}
    kind = rope.get("rope_type") or rope.get("type")
    if isinstance(kind, str) and kind in family.rope_types:
        kind = result["rope_type"] = family.rope_types[kind]
    original = config.get(
        "original_max_position_embeddings", family.defaults.get("original_max_position_embeddings")
    )
    if kind in _SCALED_FROM and original is not None:
        result["original_max_position_embeddings"] = original
    return result
