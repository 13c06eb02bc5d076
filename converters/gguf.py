"""Reader for GGUF files (gguf_families.py has the architectures)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.config import ModelConfig, is_matrix
from tmac_py.converters.bitnet import exact_ternary
from tmac_py.converters.checkpoint import (
    HEADS,
    NO_TOKENIZER,
    Checkpoint,
    FloatMatrix,
    TensorSource,
    as_float32,
    check_tensors,
    listed,
    naming,
)
from tmac_py.converters.gguf_container import MAGIC, GGUFFile, GGUFTensor, Metadata
from tmac_py.converters.gguf_families import ARCHITECTURES, Architecture
from tmac_py.converters.gguf_rope import ROPE_TENSORS, rope_scaling, shortest
from tmac_py.converters.gguf_stacked import experts_apart, projections_apart
from tmac_py.converters.gguf_types import (
    BLOCK_TYPES,
    CODEBOOK_TYPES,
    FLOAT_TYPES,
    CodebookMatrix,
    decode_i2_s,
    decode_tensor,
)
from tmac_py.converters.gguf_vocab import read_vocab
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.quant import QuantTensor

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Parts of GGUF tensor names -> parts of Hugging Face names, for "llama"."""

_OF_EXPERTS = ("ffn_gate", "ffn_up", "ffn_down")

_MATRIX_TYPES = (*FLOAT_TYPES, *BLOCK_TYPES, "I2_S", *CODEBOOK_TYPES)

_UNMARKED_TILES = ("TL1", "TL2")


def detect(path: Path) -> bool:
    """Whether ``path`` is a file that begins like a GGUF file, or is named like one."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC or path.suffix == ".gguf"


def read(path: Path) -> Checkpoint:
    """Check the file's structure, configuration, tokenizer and tensor list; weights stay mapped.

    Raises ModelFileError or UnsupportedError.
    """
    file = GGUFFile(path)
    metadata = file.metadata
    _refuse_unsupported(path, metadata, file.tensors)
    with naming(path):
        vocab = read_vocab(path, metadata)
        config = _config(metadata, file.tensors)
        if vocab is not None:
            config = replace(
                config, bos_token_id=vocab.bos_token_id, eos_token_ids=vocab.eos_token_ids
            )
        config.validate()
    if vocab is not None and vocab.size != config.vocab_size:
        raise ModelFileError(
            f"{path}: the vocabulary has {vocab.size} tokens, "
            f"the embedding {config.vocab_size} rows"
        )
    architecture = ARCHITECTURES[metadata.get("general.architecture", str)]
    names = {**_NAMES, **architecture.names}
    if architecture.has_experts:
        names |= {
            f"{stem}_exps.{i}": f"mlp.experts.{i}.{names[stem].removeprefix('mlp.')}"
            for i in range(config.num_experts)
            for stem in _OF_EXPERTS
        }
    gguf_names = {ours: theirs for theirs, ours in names.items()}
    stored = experts_apart(file.tensors) if architecture.has_experts else file.tensors
    tensors = {
        _renamed(name, names, "model.layers."): tensor
        for name, tensor in stored.items()
        if name not in ROPE_TENSORS
    }
    expected = config.tensor_shapes()
    tensors = projections_apart(tensors, expected)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    check_tensors(path, shapes, expected, name_of=lambda name: _renamed(name, gguf_names, "blk."))
    _refuse_types(path, file.tensors)
    source = {"format": "gguf", "file": path.name}
    if (name := metadata.find("general.name", str)) is not None:
        source["name"] = name
    return Checkpoint(
        config=config,
        tokenizer={} if vocab is None else vocab.files,
        source=source,
        tensors=[_source(name, tensors[name], config, architecture) for name in expected],
        warnings=(NO_TOKENIZER.format(path),) if vocab is None else vocab.warnings,
    )


def _refuse_unsupported(path: Path, metadata: Metadata, tensors: dict[str, GGUFTensor]) -> None:
    architecture = metadata.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedError(f"{path}: architecture {architecture!r} is not supported ({known})")
    experts = ARCHITECTURES[architecture].has_experts
    if metadata.get(f"{architecture}.expert_count", int, 0) and not experts:
        known = ", ".join(name for name, known in ARCHITECTURES.items() if known.has_experts)
        raise UnsupportedError(
            f"{path}: mixture-of-experts models of this architecture are not supported ({known})"
        )
    if metadata.get(f"{architecture}.expert_shared_count", int, 0):
        raise UnsupportedError(f"{path}: shared experts are not supported")
    if "split.count" in metadata and metadata.get("split.count", int) > 1:
        raise UnsupportedError(f"{path}: split GGUF files are not supported; join them first")
    biases = [name for name in tensors if name.endswith(".bias")]
    if biases and architecture != "qwen2":
        raise UnsupportedError(
            f"{path}: biases are not supported ({biases[0]}, {len(biases)} in all)"
        )
    for tensor in tensors.values():
        if tensor.kind in _UNMARKED_TILES:
            raise UnsupportedError(
                f"{path}: tensor {tensor.name} is {tensor.kind} of bitnet.cpp, whose tile sizes "
                "the file does not say; an I2_S file of the model can be read"
            )
    for name in ("logit_scale", "embedding_scale", "residual_scale", "expert_weights_scale"):
        key = f"{architecture}.{name}"
        if metadata.get(key, float, 1.0) not in (0.0, 1.0):
            raise UnsupportedError(f"{path}: metadata key {key} is not supported")


def _refuse_types(path: Path, tensors: dict[str, GGUFTensor]) -> None:
    """Matrices may be of any type known here, norms and routers are float."""
    bad = [
        f"{name} {tensor.kind}"
        for name, tensor in tensors.items()
        if tensor.kind
        not in (
            FLOAT_TYPES
            if len(tensor.shape) == 1 or name.endswith(".ffn_gate_inp.weight")
            else _MATRIX_TYPES
        )
    ]
    if bad:
        known = ", ".join(_MATRIX_TYPES)
        raise UnsupportedError(f"{path}: tensor types are not supported: {listed(bad)} ({known})")


def _config(metadata: Metadata, tensors: dict[str, GGUFTensor]) -> ModelConfig:
    name = metadata.get("general.architecture", str)
    hidden = metadata.get(f"{name}.embedding_length", int)
    heads = metadata.get(f"{name}.attention.head_count", int)
    if heads < 1:
        raise ModelFileError(f"metadata key {name}.attention.head_count is {heads}")
    head_dim = metadata.get(f"{name}.attention.key_length", int, hidden // heads)
    architecture = ARCHITECTURES[name]
    rotary_dim = metadata.get(f"{name}.rope.dimension_count", int, head_dim)
    whole = ["attention.value_length"]
    if not architecture.partly_turned:
        whole.append("rope.dimension_count")
    for key in (f"{name}.{part}" for part in whole):
        if metadata.get(key, int, head_dim) != head_dim:
            raise UnsupportedError(
                f"metadata key {key} is {metadata.get(key, int)}: "
                f"only the full head, {head_dim}, is supported"
            )
    embedding = tensors.get("token_embd.weight")
    theta = metadata.get(f"{name}.rope.freq_base", float, 10000.0)
    context = metadata.get(f"{name}.context_length", int)
    kinds = {tensor.kind for tensor in tensors.values()}
    return ModelConfig(
        hidden_size=hidden,
        intermediate_size=metadata.get(f"{name}.feed_forward_length", int),
        num_hidden_layers=metadata.get(f"{name}.block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=metadata.get(f"{name}.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        vocab_size=(
            metadata.get(f"{name}.vocab_size", int) if embedding is None else embedding.shape[0]
        ),
        rms_norm_eps=shortest(metadata.get(f"{name}.attention.layer_norm_rms_epsilon", float)),
        rope_theta=shortest(theta),
        rope_scaling=rope_scaling(metadata, tensors, theta, rotary_dim, context),
        max_position_embeddings=context,
        tie_word_embeddings="output.weight" not in tensors,
        partial_rotary_factor=_share(rotary_dim, head_dim),
        activation_bits=8 if architecture.ternary or "I2_S" in kinds else None,
        **architecture.fields(metadata),
    )


def _share(rotary_dim: int, head_dim: int) -> float:
    """``partial_rotary_factor``; the product with ``head_dim`` is rounded down when it is used."""
    share = rotary_dim / max(head_dim, 1)
    return share if int(head_dim * share) == rotary_dim else math.nextafter(share, math.inf)


def _renamed(name: str, names: Mapping[str, str], layers: str) -> str:
    """``name`` with the part after the layer as ``names`` has it, the layer after ``layers``.

    ``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``, and back; others stay.
    """
    match = re.fullmatch(r"(?:(?:blk|model\.layers)\.(\d+)\.)?(.+)\.(weight|bias)", name)
    if match is None or match[2] not in names:
        return name
    layer = "" if match[1] is None else f"{layers}{match[1]}."
    return f"{layer}{names[match[2]]}.{match[3]}"


def _source(
    name: str, tensor: GGUFTensor, config: ModelConfig, architecture: Architecture
) -> TensorSource:
    shape, kind = tensor.shape, tensor.kind
    rows = _row_order(name, config) if architecture.interleaved else None
    if not is_matrix(name, shape):
        return TensorSource(name, shape, lambda: as_float32(_floats(tensor)))
    if kind in FLOAT_TYPES and architecture.ternary and name not in HEADS:
        return TensorSource(name, shape, lambda: exact_ternary(FloatMatrix(_floats(tensor), rows)))
    if kind in FLOAT_TYPES:
        return TensorSource(name, shape, lambda: FloatMatrix(_floats(tensor), rows), dense=True)
    if kind in CODEBOOK_TYPES:
        matrix = CodebookMatrix(tensor.data, shape, kind, rows)
        return TensorSource(name, shape, lambda: matrix, dense=True, codebook=kind)
    return TensorSource(name, shape, partial(_load_codes, tensor, rows))


def _floats(tensor: GGUFTensor) -> NDArray[Any]:
    return tensor.data.view(FLOAT_TYPES[tensor.kind]).reshape(tensor.shape)


def _load_codes(tensor: GGUFTensor, rows: NDArray[np.intp] | None) -> QuantTensor:
    m, k = tensor.shape
    if tensor.kind == "I2_S":
        return decode_i2_s(tensor.data.reshape(-1), (m, k), rows=rows)
    return decode_tensor(tensor.data, k, BLOCK_TYPES[tensor.kind], rows=rows)


def _row_order(name: str, config: ModelConfig) -> NDArray[np.intp] | None:
    """Where each row of q and k stands in the file, None for other tensors.

    llama.cpp stores the two halves of every head interleaved: row 2i + s of a head is row
    s * head_dim / 2 + i of Hugging Face's order.
    """
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if heads is None:
        return None
    rows = np.arange(heads * config.head_dim).reshape(heads, config.head_dim // 2, 2)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(-1)
