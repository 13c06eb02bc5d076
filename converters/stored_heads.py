"""Embedding and lm_head that a checkpoint stores as codes, given up for codes of fewer bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.checkpoint import HEADS, Checkpoint, Shape, TensorSource
from tmac_py.quant import QuantTensor


@dataclass(frozen=True)
class DequantisedMatrix:
    """Rows of a quantised matrix ``[m, k]``, in float32 as they are sliced."""

    stored: QuantTensor

    @property
    def shape(self) -> Shape:
        """``(m, k)``."""
        return self.stored.codes.shape

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        part, scales, offsets = self.stored, self.stored.scales, self.stored.offsets
        return replace(
            part,
            codes=part.codes[rows],
            scales=None if scales is None else scales[rows],
            offsets=None if offsets is None else offsets[rows],
        ).dequantize()


def requantize_heads(checkpoint: Checkpoint, bits: int) -> Checkpoint:
    """The checkpoint with heads that are stored in more than ``bits`` bits as floats."""
    tensors = [_as_floats(tensor, bits) for tensor in checkpoint.tensors]
    return replace(checkpoint, tensors=tensors)


def _as_floats(tensor: TensorSource, bits: int) -> TensorSource:
    def load() -> DequantisedMatrix:
        stored = tensor.load()
        assert isinstance(stored, QuantTensor)
        return DequantisedMatrix(stored)

    if tensor.dense or tensor.name not in HEADS or load().stored.bits <= bits:
        return tensor
    return replace(tensor, load=load, dense=True, ordered=False)
