"""Tensors of GGUF files that hold several matrices of a layer, each for itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tmac_py.converters.checkpoint import Shape
from tmac_py.converters.fused_projections import stored_matrices
from tmac_py.converters.gguf_container import GGUFTensor

_NOT_IN_ROWS = ("I2_S", "TL1", "TL2")
"""Types whose tensors are not stored row by row."""


def experts_apart(tensors: Mapping[str, GGUFTensor]) -> dict[str, GGUFTensor]:
    """``blk.0.ffn_up_exps.weight [experts, m, k]`` as ``blk.0.ffn_up_exps.0.weight`` and so on."""
    result: dict[str, GGUFTensor] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix("_exps.weight")
        if stem == name or len(tensor.shape) != 3:
            result[name] = tensor
            continue
        experts, m, k = tensor.shape
        for i in range(experts):
            rows = tensor.data[i * m : (i + 1) * m]
            result[f"{stem}_exps.{i}.weight"] = replace(tensor, shape=(m, k), data=rows)
    return result


def projections_apart(
    tensors: Mapping[str, GGUFTensor], shapes: Mapping[str, Shape]
) -> dict[str, GGUFTensor]:
    """Fused projections, by their Hugging Face names, as those of a model of these ``shapes``.

    What is not of the shape that they have together stays as it is.
    """
    result = dict(tensors)
    for name, place in stored_matrices(shapes, tensors).items():
        stored = tensors.get(f"{place.module}.weight")
        if stored is None or place.shape == shapes[name] or stored.shape != place.shape:
            continue
        if stored.kind not in _NOT_IN_ROWS:
            m, k = shapes[name]
            rows = stored.data[place.start : place.start + m]
            result[name] = replace(stored, shape=(m, k), data=rows)
            result.pop(f"{place.module}.weight", None)
    return result
