"""The tensors of a checkpoint layer by layer, and what float32 NumPy needs of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.checkpoint import Checkpoint, TensorSource
from tmac_py.converters.llama_forward import STAGES, Layer, LlamaForward, flat
from tmac_py.converters.quantizers import Inputs
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.quant import MatrixLike, QuantTensor

EMBEDDING, FINAL_NORM, LM_HEAD = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)

_LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_NAMES = {*_NORMS, *(name for stage in STAGES for name in stage)}


def layers_of(checkpoint: Checkpoint) -> list[dict[str, TensorSource]]:
    """For each layer, its tensors by the names that `llama_forward.Layer` has.

    Raises UnsupportedError for tensors that the graph for calibration does not know.
    """
    layers: list[dict[str, TensorSource]] = [{} for _ in range(checkpoint.config.num_hidden_layers)]
    for tensor in checkpoint.tensors:
        if match := _LAYER_TENSOR.fullmatch(tensor.name):
            layers[int(match[1])][match[2]] = tensor
        elif tensor.name not in (EMBEDDING, FINAL_NORM, LM_HEAD):
            raise UnsupportedError(f"calibration does not know the tensor {tensor.name}")
    for layer in layers:
        if unknown := sorted(set(layer) ^ _NAMES):
            raise UnsupportedError(f"calibration does not know the tensor {unknown[0]} of a layer")
    return layers


def find(checkpoint: Checkpoint, name: str) -> TensorSource:
    """The tensor of that name, which must be there."""
    return next(tensor for tensor in checkpoint.tensors if tensor.name == name)


@contextmanager
def naming_tensor(name: str) -> Iterator[None]:
    """Turn a ValueError raised inside into a ModelFileError that names the tensor."""
    try:
        yield
    except ValueError as error:
        raise ModelFileError(f"tensor {name}: {error}") from error


def as_floats(
    loaded: QuantTensor | MatrixLike | NDArray[np.float32],
) -> NDArray[np.float32]:
    """All of a tensor in float32; ValueError for weights that are not finite."""
    if isinstance(loaded, QuantTensor):
        whole = loaded.dequantize()
    elif isinstance(loaded, np.ndarray):
        whole = loaded
    else:
        whole = np.ascontiguousarray(loaded[slice(0, loaded.shape[0])], np.float32)
    if not np.isfinite(whole).all():
        raise ValueError("weights are not finite")
    return whole


def embed(embedding: QuantTensor | MatrixLike, texts: NDArray[np.int32]) -> NDArray[np.float32]:
    """Rows of the embedding for ids ``[n, length]``: float32 ``[n, length, hidden]``."""
    ids, places = np.unique(texts, return_inverse=True)
    m = embedding.m if isinstance(embedding, QuantTensor) else embedding.shape[0]
    if ids[-1] >= m:
        raise ValueError(f"has {m} rows; the tokenizer has a token {ids[-1]}")
    rows: NDArray[np.float32]
    if isinstance(embedding, QuantTensor):
        rows = replace(
            embedding,
            codes=embedding.codes[ids],
            scales=None if embedding.scales is None else embedding.scales[ids],
            offsets=None if embedding.offsets is None else embedding.offsets[ids],
        ).dequantize()
    else:
        rows = np.concatenate([as_floats(embedding[slice(int(i), int(i) + 1)]) for i in ids])
    return rows[places.reshape(texts.shape)]


def input_sizes(checkpoint: Checkpoint, texts: NDArray[np.int32]) -> dict[str, NDArray[np.float32]]:
    """Mean square of the inputs ``[k]`` of every matrix of the model as it is, by its name.

    The embedding has some only where it serves as lm_head too.
    """
    sizes: dict[str, NDArray[np.float32]] = {}
    forward = LlamaForward(checkpoint.config, texts.shape[1])
    with naming_tensor(EMBEDDING):
        hidden = embed(find(checkpoint, EMBEDDING).load(), texts)
    for tensors in layers_of(checkpoint):
        layer: Layer = {}
        for name, tensor in tensors.items():
            with naming_tensor(tensor.name):
                layer[name] = as_floats(tensor.load())

        def record(
            stage: tuple[str, ...],
            x: NDArray[np.float32],
            tensors: dict[str, TensorSource] = tensors,
        ) -> None:
            mean_square = Inputs(x).mean_square
            sizes.update({tensors[name].name: mean_square for name in stage})

        forward.run_layer(layer, hidden, record)
    norm = as_floats(find(checkpoint, FINAL_NORM).load())
    head = EMBEDDING if checkpoint.config.tie_word_embeddings else LM_HEAD
    sizes[head] = Inputs(flat(forward.normalise(hidden, norm))).mean_square
    return sizes
