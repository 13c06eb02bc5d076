"""A .lut file of a few kilobytes with random contents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.config import ModelConfig
from tmac_py.lutheader import packed_nbytes
from tmac_py.lutwriter import LutWriter
from tmac_py.spec import LinearSpec

CONFIG = ModelConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    vocab_size=33,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
TOKENIZER = {"tokenizer.json": '{"model": "ü"}'.encode(), "chat_template.jinja": b"", "z": b"abc"}
SOURCE = {"model": "tiny", "license": "none"}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def spec_of(shape: tuple[int, ...]) -> LinearSpec:
    return LinearSpec(shape[0], shape[1], bits=3, group_size=16, offset_kind="offset")


def contents(seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 256, packed_nbytes(spec_of(shape)), dtype=np.uint8)
        if len(shape) == 2
        else rng.standard_normal(shape).astype(np.float32)
        for name, shape in CONFIG.tensor_shapes().items()
    }


def write(path: Path) -> dict[str, NDArray[Any]]:
    """Write the file; returns what is in it."""
    tensors = contents()
    with LutWriter(path, config=CONFIG, tokenizer=TOKENIZER, source=SOURCE) as writer:
        for name, values in tensors.items():
            if values.dtype == np.uint8:
                writer.add_linear(name, values, spec_of(CONFIG.tensor_shapes()[name]))
            else:
                writer.add_float(name, values)
    return tensors
