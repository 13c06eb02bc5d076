"""Experts that a checkpoint stores as one tensor: ``[experts, m, k]``.

As transformers 5 holds them (``mlp.experts.gate_up_proj``, ``mlp.experts.down_proj``), and writes
them if asked not to take the checkpoints' own form, which has a module for each expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tmac_py.converters.safetensors_file import DTYPES, StoredTensor

_PARTS = {
    ".mlp.experts.gate_up_proj": ("gate_proj", "up_proj"),
    ".mlp.experts.down_proj": ("down_proj",),
}
"""End of a name -> the matrices in it, the rows of one after those of another."""


def split_experts(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same tensors with a matrix of each expert in place of those of all.

    ``mlp.experts.down_proj`` of a layer becomes ``mlp.experts.0.down_proj.weight`` and so on.
    Tensors of other shapes stay as they are.
    """
    result: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        end = next((end for end in _PARTS if name.endswith(end)), None)
        if end is None or len(tensor.shape) != 3 or tensor.shape[1] % len(_PARTS[end]):
            result[name] = tensor
            continue
        experts, rows, k = tensor.shape
        shape = (rows // len(_PARTS[end]), k)
        nbytes = math.prod(shape) * np.dtype(DTYPES[tensor.dtype]).itemsize
        start = tensor.start
        for expert in range(experts):
            for part in _PARTS[end]:
                matrix = f"{name.removesuffix(end)}.mlp.experts.{expert}.{part}.weight"
                result[matrix] = replace(tensor, name=matrix, shape=shape, start=start)
                start += nbytes
    return result
