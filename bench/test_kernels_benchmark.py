"""pytest-benchmark cases of the kernels on the active ISA, to compare two commits.

    pytest bench --benchmark-only --benchmark-save=before
    pytest bench --benchmark-only --benchmark-compare

(--benchmark-only overrides the --benchmark-skip of pyproject.toml; without it everything here is
skipped.) A round is a table build and a product with one vector, on one thread, in cache.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from tmac_py import LutLinear, QuantTensor, _core

SHAPE = (4096, 4096)
GROUP_SIZE = 128


@pytest.mark.parametrize("tables", ["int8", "exact"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_matrix_times_vector(
    benchmark: BenchmarkFixture, bits: int, tables: Literal["int8", "exact"]
) -> None:
    m, k = SHAPE
    rng = np.random.default_rng(0)
    weights = QuantTensor(
        codes=rng.integers(1 << bits, size=SHAPE, dtype=np.uint8),
        scales=np.full((m, k // GROUP_SIZE), 0.01, dtype=np.float16),
        offsets=None,
        bits=bits,
        group_size=GROUP_SIZE,
        offset_kind="none",
        zero=2.0 ** (bits - 1),
    )
    linear = LutLinear(weights, threads=1, tables=tables)
    x = rng.standard_normal(k, dtype=np.float32)
    benchmark.extra_info["isa"] = _core.active_isa()
    benchmark.extra_info["packed_bytes"] = linear.nbytes
    y = benchmark(linear.forward, x)
    assert y.shape == (m,)
