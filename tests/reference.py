"""The definition of what the core computes, in slow and obvious NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tmac_py.quant import QuantTensor

BLOCK = 16
"""Weights along k that share one table scale."""

EXACT_MAX = 8128
"""Exact tables round a block's activations to integers of at most this magnitude."""


def int8_lut(x: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Tables of one block x [16] -> entries [4, 16] int8-valued, and their scale."""
    signs = np.array([[1 if e >> i & 1 else -1 for i in range(4)] for e in range(16)])
    sums = x.reshape(4, 4).astype(np.float64) @ signs.T
    limit = np.abs(x.reshape(4, 4)).astype(np.float64).sum(1).max()
    if limit == 0:
        return np.zeros((4, 16), np.int32), np.float32(0)
    return np.rint(sums * (127 / limit)).astype(np.int32), np.float32(limit / 127)


def quantised_activations(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What exact tables make of one block x [16]: integers times the block's scale."""
    limit = np.abs(x).max().astype(np.float64)
    if limit == 0:
        return np.zeros(BLOCK)
    return np.rint(x * (EXACT_MAX / limit)) * (limit / EXACT_MAX)


def chunked(q: QuantTensor, x: NDArray[np.float32]) -> list[tuple[int, NDArray[np.int64]]]:
    """The positions along k behind each chunk of 8: (group, indices [<= 8])."""
    chunks = []
    for group in range(q.n_groups):
        begin = group * q.group_size
        end = min(q.k, begin + q.group_size)
        chunks += [(group, np.arange(at, min(at + 8, end))) for at in range(begin, end, 8)]
    return chunks


def multiply(q: QuantTensor, x: NDArray[np.float32], tables: str) -> NDArray[np.float64]:
    """y [m] = dequantised q [m, k] times x [k], with the arithmetic of the named tables.

    Follows docs/kernels.md: chunks of 8 weights, blocks of 2 chunks, one table scale a block.
    Everything that the core does in float32 is done in float64 here.
    """
    chunks = chunked(q, x)
    y = np.zeros(q.m)
    half = (2**q.bits - 1) / 2
    looked_up = np.zeros((q.m, q.n_groups))
    x_sums = np.zeros(q.n_groups)
    for start in range(0, len(chunks), 2):
        block = chunks[start : start + 2]
        values = np.zeros(BLOCK, np.float32)
        codes = np.zeros((q.m, BLOCK), np.int64)
        for i, (_, at) in enumerate(block):
            values[8 * i : 8 * i + at.size] = x[at]
            codes[:, 8 * i : 8 * i + at.size] = q.codes[:, at]
        entries, scale = int8_lut(values)
        exact = quantised_activations(values)
        for i, (group, at) in enumerate(block):
            eight = slice(8 * i, 8 * i + 8)
            if tables == "exact":
                sums = (codes[:, eight] - half) @ exact[eight]
                x_sums[group] += exact[eight].sum()
            else:
                sums = np.zeros(q.m)
                for t in (2 * i, 2 * i + 1):
                    four = codes[:, 4 * t : 4 * t + 4]
                    for plane in range(q.bits):
                        index = (four >> plane & 1) @ np.array([1, 2, 4, 8])
                        sums += 2.0 ** (plane - 1) * entries[t][index]
                sums *= float(scale)
                x_sums[group] += x[at].astype(np.float64).sum()
            looked_up[:, group] += sums
    scales = q.scales.astype(np.float64)
    if q.offset_kind == "none":
        return (scales * (looked_up + (half - q.zero) * x_sums)).sum(1)
    stored = q.offsets.astype(np.float64)
    if q.offset_kind == "zero":
        return (scales * (looked_up + (half - stored) * x_sums)).sum(1)
    return (scales * (looked_up + half * x_sums) + stored * x_sums).sum(1)
