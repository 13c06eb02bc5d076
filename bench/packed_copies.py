"""How weights are stored: random matrices of each encoding, packed for the core.

This is the only place that knows which encodings the core has. A new one needs a name in
``ENCODINGS`` and a branch in :func:`code_bits` and :func:`packed_matrix`; what competes with it is
in peer_types.py.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py import _core

TERNARY = "ternary"
_BCQ = "bcq"  # and the bits
_BCQ_ENCODINGS = tuple(f"{_BCQ}{bits}" for bits in range(1, 5))
ENCODINGS = (*(str(bits) for bits in range(1, 9)), TERNARY, *_BCQ_ENCODINGS)
_ALIGNMENT = 64
_DISTINCT_ROWS = 1024  # random; the others repeat them, the time does not depend on it


@dataclass(frozen=True)
class PackedMatrix:
    """Packed bytes, and how to make a matrix of the core of such bytes."""

    data: NDArray[np.uint8]
    linear: Callable[[NDArray[np.uint8]], _core.Linear]


def code_bits(encoding: str) -> float:
    """Bits of a weight without scales."""
    return 5 / 3 if encoding == TERNARY else int(encoding.removeprefix(_BCQ))


def packed_matrix(encoding: str, m: int, k: int, *, group_size: int) -> PackedMatrix:
    """A random matrix [m, k] in one of ``ENCODINGS``. Ternary ones have one scale, as in BitNet."""
    ternary, bcq = encoding == TERNARY, encoding in _BCQ_ENCODINGS
    bits = 2 if ternary else int(code_bits(encoding))
    group_size = k if ternary else min(group_size, k)
    rng = np.random.default_rng(0)
    rows = min(m, _DISTINCT_ROWS)
    codes = rng.integers(3 if ternary else 1 << bits, size=(rows, k), dtype=np.uint8)
    per_group = (m, -(-k // group_size))
    scales = np.full((*per_group, bits) if bcq else per_group, 0.01, dtype=np.float16)
    kind: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "offset_kind": "offset" if bcq else "none",
        "encoding": "ternary" if ternary else "bcq" if bcq else "uniform",
        "scale": 0.01 if ternary else None,
    }
    data = _core.pack(
        np.resize(codes, (m, k)),
        None if ternary else scales,
        np.zeros(per_group, dtype=np.float16) if bcq else None,
        **kind,
    )
    zero = 1.0 if ternary else 0.0 if bcq else 2.0 ** (bits - 1)

    def linear(packed: NDArray[np.uint8]) -> _core.Linear:
        return _core.Linear(packed, m=m, k=k, zero=zero, **kind)

    return PackedMatrix(data, linear)


class Copies:
    """Copies of one matrix that together have at least ``nbytes``, in one buffer.

    Its pages are of ordinary size, as those of a mapped .lut file, or ``huge_pages`` (2 MB) if the
    system grants them.
    """

    def __init__(self, matrix: PackedMatrix, *, nbytes: int, huge_pages: bool = False) -> None:
        self.nbytes = matrix.data.nbytes
        stride = -(-self.nbytes // _ALIGNMENT) * _ALIGNMENT
        count = max(1, -(-nbytes // stride))
        memory = mmap.mmap(-1, count * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge_pages:
            with suppress(OSError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        buffer = np.frombuffer(memory, dtype=np.uint8)
        self._linears = []
        for start in range(0, count * stride, stride):
            copy = buffer[start : start + self.nbytes]
            copy[:] = matrix.data
            self._linears.append(matrix.linear(copy))
        self._turn = 0

    def pick(self) -> _core.Linear:
        """The copy that was used longest ago."""
        self._turn = (self._turn + 1) % len(self._linears)
        return self._linears[self._turn]
