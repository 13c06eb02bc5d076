"""Models of known shapes with random weights: how fast a shape runs needs no others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from tmac_py.config import ModelConfig, is_matrix
from tmac_py.errors import OptionError
from tmac_py.lutheader import ROW_TILE, packed_nbytes
from tmac_py.lutwriter import LutWriter
from tmac_py.packing import pack
from tmac_py.quant import QuantTensor
from tmac_py.spec import LinearSpec

SHAPES: Mapping[str, ModelConfig] = MappingProxyType(
    {
        "llama-2-7b": ModelConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            head_dim=128,
            vocab_size=32000,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        ),
        "llama-3-8b": ModelConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=128256,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            max_position_embeddings=8192,
            tie_word_embeddings=False,
        ),
        "bitnet-2b-4t": ModelConfig(
            hidden_size=2560,
            intermediate_size=6912,
            num_hidden_layers=30,
            num_attention_heads=20,
            num_key_value_heads=5,
            head_dim=128,
            vocab_size=128256,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            hidden_act="relu2",
            activation_bits=8,
            sub_norms=True,
        ),
        "qwen3-30b-a3b": ModelConfig(
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            vocab_size=151936,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
            qk_norm=True,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
        ),
        "olmoe-1b-7b": ModelConfig(
            hidden_size=2048,
            intermediate_size=1024,
            num_hidden_layers=16,
            num_attention_heads=16,
            num_key_value_heads=16,
            head_dim=128,
            vocab_size=50304,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            full_qk_norm=True,
            num_experts=64,
            num_experts_per_tok=8,
            moe_intermediate_size=1024,
        ),
        "smollm2-135m": ModelConfig(
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            vocab_size=49152,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
    }
)
"""By name; each also with fewer layers, as in "llama-2-7b/8"."""

WEIGHTS = ("ternary", *(f"{bits}bit" for bits in range(1, 9)))
"""Of the matrices: ternary with one scale, else 1 to 8 bits with a scale for 128 weights."""

HEAD_BITS = 6
"""Of embedding and lm_head where the other matrices have fewer."""

_GROUP_SIZE = 128

_TILES = 8
"""Tiles of 32 rows that are drawn; a matrix repeats them."""


def parse_synthetic(text: str) -> tuple[ModelConfig, str]:
    """The configuration and the weights of "llama-2-7b:2bit" or "llama-2-7b/8:2bit" (8 layers).

    Raises OptionError, naming what is allowed, for anything else.
    """
    found = re.fullmatch(r"([^/:]+)(?:/([0-9]+))?:(.+)", text)
    if found is None or found[1] not in SHAPES or found[3] not in WEIGHTS:
        raise OptionError(
            f"{text!r} is not a synthetic model; allowed: SHAPE:WEIGHTS or SHAPE/LAYERS:WEIGHTS, "
            f"with SHAPE one of {', '.join(SHAPES)} and WEIGHTS one of {', '.join(WEIGHTS)}"
        )
    config = SHAPES[found[1]]
    if found[2] is not None:
        config = replace(config, num_hidden_layers=int(found[2]))
    config.validate()
    return config, found[3]


def write_synthetic(path: str | Path, text: str, *, seed: int = 0) -> None:
    """Write a .lut without a tokenizer, of random weights: equal arguments give equal bytes.

    Args:
        path: the file.
        text: as :func:`parse_synthetic` reads it.
        seed: of the weights.

    Raises:
        OptionError: ``text`` names no such model.
        OSError: the file cannot be written.
    """
    config, weights = parse_synthetic(text)
    rng = np.random.default_rng(seed)
    with LutWriter(path, config=config, tokenizer={}, source={"synthetic": text}) as writer:
        for name, shape in config.tensor_shapes().items():
            if not is_matrix(name, shape):
                writer.add_float(name, _random_floats(rng, shape))
                continue
            is_head = name in ("model.embed_tokens.weight", "lm_head.weight")
            m, k = shape
            rows = _random_rows(rng, k, _head_bits(weights) if is_head else weights)
            spec = replace(rows.spec, m=m)
            writer.add_linear(name, _repeat_tiles(pack(rows), spec), spec)


def _random_floats(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Norms of ones; routers under which every expert is chosen as often."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    values = rng.standard_normal(shape, np.float32)
    values /= np.float32(shape[1] ** 0.5)
    return values


def _head_bits(weights: str) -> str:
    bits = 0 if weights == "ternary" else int(weights[0])
    return f"{max(bits, HEAD_BITS)}bit"


def _random_rows(rng: np.random.Generator, k: int, weights: str) -> QuantTensor:
    """A matrix of ``_TILES`` tiles whose rows have a length of about 1."""
    rows = _TILES * ROW_TILE
    if weights == "ternary":
        codes = rng.integers(0, 3, (rows, k), dtype=np.uint8)
        return QuantTensor(
            codes,
            None,
            None,
            2,
            k,
            "none",
            zero=1,
            encoding="ternary",
            scale=float(np.float32((1.5 / k) ** 0.5)),
        )
    bits, group_size = int(weights[0]), math.gcd(k, _GROUP_SIZE)
    zero = (2**bits - 1) / 2
    codes = rng.integers(0, 2**bits, (rows, k), dtype=np.uint8)
    scale = 1 / (k * (4**bits - 1) / 12) ** 0.5
    scales = np.full((rows, k // group_size), scale, np.float16)
    return QuantTensor(codes, scales, None, bits, group_size, "none", zero=zero)


def _repeat_tiles(packed: NDArray[np.uint8], spec: LinearSpec) -> NDArray[np.uint8]:
    """The packed bytes of ``spec``, made of the tiles of a matrix with fewer rows."""
    nbytes = packed_nbytes(spec)
    one, two = (packed_nbytes(replace(spec, m=tiles * ROW_TILE)) for tiles in (1, 2))
    tile, end = two - one, 2 * one - two  # bytes behind the last tile are zeros
    whole = np.zeros(nbytes, np.uint8)
    whole[: nbytes - end] = np.resize(packed[: _TILES * tile], nbytes - end)
    return whole
