"""How much int8 arithmetic changes a product: its error against float64 on Gaussian and on
heavy-tailed activations (docs/kernels.md)."""

from __future__ import annotations

import numpy as np
import pytest

from kernel_cases import random_activations
from tmac_py import _core
from tmac_py.packing import open_linear, pack
from tmac_py.quant import quantize_rtn

LARGEST = 5e-5
"""Mean squared error relative to the mean square of the products."""


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed"])
@pytest.mark.parametrize("n_tokens", [16, 300])
@pytest.mark.parametrize(
    ("bits", "group_size"),
    # Not 2 bits over whole rows: most codes are then the middle ones, whose planes cancel, and the
    # same error of the tables is a larger part of a smaller product (8.3e-5).
    [(2, 64), (2, 128), (4, 64), (4, 128), (4, -1)],
)
def test_int8_products_are_close(bits: int, group_size: int, n_tokens: int, kind: str) -> None:
    rng = np.random.default_rng(bits)
    w = rng.normal(size=(128, 4096)).astype(np.float32)
    q = quantize_rtn(w, bits=bits, group_size=group_size)
    x = random_activations(rng, kind, 304, 4096)
    weights = q.dequantize().astype(np.float64)
    linear = open_linear(pack(q), q.spec)
    pool = _core.ThreadPool(2)
    error = size = 0.0
    for start in range(0, len(x), n_tokens):
        part = x[start : start + n_tokens]
        want = part.astype(np.float64) @ weights.T
        found = _core.linear_forward(linear, part, pool, tables="int8")
        error += float(np.square(found - want).sum())
        size += float(np.square(want).sum())
    assert error / size <= LARGEST
