"""The read bandwidth that benchmarks compare with."""

from __future__ import annotations

import pytest

from tmac_py import _core

MIB = 1 << 20


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("nbytes", [MIB, 8 * MIB + 4321])
def test_read_bandwidth_is_plausible(threads: int, nbytes: int) -> None:
    assert 0.01 < _core.read_bandwidth(nbytes, _core.ThreadPool(threads)) < 10_000


def test_small_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="nbytes must be at least 1048576, not 1048575"):
        _core.read_bandwidth(MIB - 1, _core.ThreadPool(1))
