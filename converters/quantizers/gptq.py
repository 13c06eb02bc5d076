"""``gptq``: evenly spaced codes, with the errors of the outputs in view (Frantar et al., 2022)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.quantizers.base import Inputs, Settings, uniform_tensor
from tmac_py.converters.quantizers.feedback import encode_with_feedback
from tmac_py.quant import MatrixLike, QuantTensor, encode_groups, symmetric_zero

Floats = NDArray[np.float32]


def quantize_gptq(matrix: MatrixLike, settings: Settings, inputs: Inputs | None) -> QuantTensor:
    """Rounds to the grid with the least squared error of each group, weighted by mean ``x**2``."""
    assert inputs is not None

    def fit(w: Floats, importance: Floats) -> _EvenSteps:
        _, scales, offsets = encode_groups(
            np.ascontiguousarray(w.T)[:, None],
            settings.bits,
            settings.asym,
            "mse",
            importance[None],
        )
        return _EvenSteps(settings, scales[:, 0], offsets[:, 0])

    encoded, order = encode_with_feedback(matrix, settings, inputs, fit)
    return uniform_tensor(encoded, settings.bits, settings.group_size, order)


class _EvenSteps:
    """The grid of scales and offsets ``[r]``."""

    def __init__(
        self, settings: Settings, scales: NDArray[np.float16], offsets: NDArray[np.float16]
    ) -> None:
        self.scales = scales
        self.offsets = offsets if settings.asym else None
        self._largest = np.float32((1 << settings.bits) - 1)
        self._zero = np.float32(0 if settings.asym else symmetric_zero(settings.bits))
        self._scale, self._offset = scales.astype(np.float32), offsets.astype(np.float32)
        self._inverse = np.zeros_like(self._scale)
        np.divide(np.float32(1), self._scale, out=self._inverse, where=self._scale != 0)

    def nearest(self, column: Floats) -> tuple[Floats, Floats]:
        q = column - self._offset
        q *= self._inverse
        q += self._zero
        np.rint(q, out=q)
        np.maximum(q, np.float32(0), out=q)
        np.minimum(q, self._largest, out=q)
        value = q - self._zero
        value *= self._scale
        value += self._offset
        return q, value
