"""GGUF files of random numbers in a known shape, quantised by the peer that is to run them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from gguf_config import add_config
from numpy.typing import NDArray
from peer_types import TYPE_IDS

from tmac_py.config import ModelConfig, is_matrix

HEAD_TYPE = "Q6_K"
"""Of embedding and lm_head where the other matrices have fewer bits, as ours."""

_SUB_NORMS = {
    "self_attn.attn_sub_norm.weight": "attn_sub_norm.weight",
    "mlp.ffn_sub_norm.weight": "ffn_sub_norm.weight",
}

Quantize = Callable[..., NDArray[np.uint8]]
"""Rows of a type and length [distinct rows, bytes of a row]; a matrix repeats them."""


def write_gguf(
    path: Path, config: ModelConfig, type_name: str, *, package: str, quantize: Quantize
) -> int:
    """Write the file; returns the bytes of the matrices that a decoded token reads."""
    arch = MODEL_ARCH.BITNET if config.sub_norms else MODEL_ARCH.LLAMA
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    add_config(writer, config)
    _add_tokens(writer, config.vocab_size)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors: list[tuple[NDArray[np.generic], tuple[int, ...]]] = []
    read = 0
    for name, shape in config.tensor_shapes().items():
        target = _gguf_name(name, names.get_name(name, try_suffixes=(".weight",)))
        if not is_matrix(name, shape):
            floats = np.ones(shape, np.float32)
            tensors.append((floats, shape))
            writer.add_tensor_info(target, shape, floats.dtype, floats.nbytes)
            continue
        is_head = name in ("model.embed_tokens.weight", "lm_head.weight")
        stored = HEAD_TYPE if is_head and type_name != "Q8_0" else type_name
        rows = quantize(type_name=stored, k=shape[1])
        stored_shape: tuple[int, ...] = (shape[0], rows.shape[1])
        tensors.append((rows, stored_shape))
        # Of a type that the writer does not know it must not look up the size of a block.
        writer.add_tensor_info(
            target,
            shape,
            np.dtype(np.float16),
            math.prod(stored_shape),
            raw_dtype=TYPE_IDS[package][stored],  # type: ignore[arg-type]
        )
        if config.tie_word_embeddings or name != "model.embed_tokens.weight":
            read += math.prod(stored_shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values, stored_shape in tensors:
        writer.write_tensor_data(np.resize(values, stored_shape))
    writer.close()
    return read


def _gguf_name(name: str, known: str | None) -> str:
    if known is not None:
        return known
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_SUB_NORMS[part]}"


def _add_tokens(writer: GGUFWriter, n: int) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{index}>" for index in range(n)])
    writer.add_token_scores([0.0] * n)
    writer.add_token_types([1] * n)
