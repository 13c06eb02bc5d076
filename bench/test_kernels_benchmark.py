"""pytest-benchmark cases of the kernels, to compare two commits.

    pytest bench --benchmark-only --benchmark-save=before
    pytest bench --benchmark-only --benchmark-compare

(--benchmark-only overrides the --benchmark-skip of pyproject.toml; without it everything here is
skipped.) A round is a product with n vectors and what it needs before, on one thread; the weights
come from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from contestants import Tables
from packed_copies import ENCODINGS, packed_matrix
from pytest_benchmark.fixture import BenchmarkFixture

from tmac_py import _core

GROUP_SIZE = 128
ISAS = [isa["name"] for isa in _core.isas() if isa["usable"]]
ROWS = {1: 4096, 4: 4096, 512: 1024}  # of the matrix, by n
COLUMNS = 4096


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.active_isa()
    name: str = request.param
    _core.use_isa(name)
    yield name
    _core.use_isa(before)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("tables", ["int8", "exact"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_matrix_times_vectors(
    benchmark: BenchmarkFixture, encoding: str, tables: Tables, n: int, isa: str
) -> None:
    matrix = packed_matrix(encoding, ROWS[n], COLUMNS, group_size=GROUP_SIZE)
    linear, pool = matrix.linear(matrix.data), _core.ThreadPool(1)
    x = np.random.default_rng(1).standard_normal((n, COLUMNS), dtype=np.float32)
    benchmark.extra_info["isa"] = isa
    benchmark.extra_info["packed_bytes"] = matrix.data.nbytes
    y = benchmark(_core.linear_forward, linear, x, pool, tables=tables)
    assert y.shape == (n, ROWS[n])
