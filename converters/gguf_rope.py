"""RoPE scaling of GGUF files: metadata, and tensors of factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.gguf_container import GGUFTensor, Metadata
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.rope import check_rope_scaling, longrope_attention

FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that go into the configuration."""


def shortest(value: float) -> float:
    """The shortest decimal number that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def rope_scaling(
    metadata: Metadata,
    tensors: Mapping[str, GGUFTensor],
    theta: float,
    rotary_dim: int,
    context: int,
) -> dict[str, Any] | None:
    """``rope_scaling`` of ModelConfig. Raises UnsupportedError or ModelFileError."""
    name = metadata.get("general.architecture", str)
    kind = metadata.get(f"{name}.rope.scaling.type", str, "none")
    factor = shortest(metadata.get(f"{name}.rope.scaling.factor", float, 1.0))
    if f"{name}.rope.scale_linear" in metadata:  # the key of the first GGUF files
        kind, factor = "linear", shortest(metadata.get(f"{name}.rope.scale_linear", float))
    if LONG_FACTORS in tensors or SHORT_FACTORS in tensors:
        return _longrope(metadata, tensors, rotary_dim, context)
    if FACTORS in tensors:
        if kind not in ("none", "linear") or factor != 1.0:
            raise UnsupportedError(f"{FACTORS} together with rope scaling {kind!r}")
        return _factor_scaling(tensors[FACTORS], theta, rotary_dim)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedError(f"rope scaling {kind!r} is not supported (none, linear, yarn)")
    original = metadata.get(f"{name}.rope.scaling.original_context_length", int, context)
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    for ours, theirs in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if (value := metadata.find(f"{name}.rope.scaling.{theirs}", float)) is not None:
            scaling[ours] = shortest(value)
    attention = metadata.get(f"{name}.rope.scaling.attn_factor", float, 1.0)
    if attention != 1.0:
        scaling["attention_factor"] = attention * (0.1 * math.log(factor) + 1.0)
    return scaling


def _factor_scaling(tensor: GGUFTensor, theta: float, rotary_dim: int) -> dict[str, Any]:
    """The numbers each RoPE frequency is divided by, as Llama 3's formula where they follow it."""
    factors = _factors(tensor, rotary_dim)
    plain = theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    low, high, original = 1.0, 4.0, 8192  # of every Llama 3 model
    keep = np.clip((original * plain / (2 * math.pi) - low) / (high - low), 0.0, 1.0)
    if np.allclose(1 / factors, keep + (1 - keep) / factors.max(), rtol=1e-5):
        return {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    return {"rope_type": "factors", "factors": [float(factor) for factor in factors]}


def _longrope(
    metadata: Metadata, tensors: Mapping[str, GGUFTensor], rotary_dim: int, context: int
) -> dict[str, Any]:
    """Two lists of factors (Phi-3), as LongRoPE has them. What is the default stays unsaid."""
    name = metadata.get("general.architecture", str)
    if absent := [which for which in (LONG_FACTORS, SHORT_FACTORS) if which not in tensors]:
        raise ModelFileError(f"tensor {absent[0]} is missing: there is one of two lists of factors")
    original = metadata.get(f"{name}.rope.scaling.original_context_length", int, context)
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "factor": context / max(original, 1),
        "original_max_position_embeddings": original,
    }
    for which, tensor in (("short_factor", SHORT_FACTORS), ("long_factor", LONG_FACTORS)):
        factors = _factors(tensors[tensor], rotary_dim)
        scaling[which] = [shortest(factor) for factor in factors]
    check_rope_scaling(scaling)
    attention = metadata.get(f"{name}.rope.scaling.attn_factor", float, 1.0)
    if not math.isclose(attention, longrope_attention(scaling), rel_tol=1e-6):
        scaling["attention_factor"] = shortest(attention)
    return scaling


def _factors(tensor: GGUFTensor, rotary_dim: int) -> NDArray[np.float64]:
    if tensor.kind != "F32" or tensor.shape != (rotary_dim // 2,):
        raise ModelFileError(
            f"tensor {tensor.name} {tensor.kind}{list(tensor.shape)}: "
            f"F32[{rotary_dim // 2}] is needed"
        )
    factors = tensor.data.view("<f4").reshape(-1).astype(np.float64)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelFileError(f"tensor {tensor.name} holds numbers that are not positive")
    return factors
