"""Writers of the quantised formats, from their descriptions: one field after the other.

And the settings that go with them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Matrix:
    """Codes ``[m, k]`` with the group of each column ``[k]``; scales and zero points
    ``[m, groups]``."""

    codes: NDArray[np.int64]
    scales: NDArray[Any]
    zeros: NDArray[np.int64]
    groups: NDArray[np.int64]
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        m, k = self.codes.shape
        return m, k

    def weight(self) -> NDArray[np.float32]:
        """What it stands for, float32 ``[m, k]``: weight by weight, scales as fp16 holds them."""
        m, k = self.shape
        scales = self.scales.astype(np.float16).astype(np.float32)
        out = np.empty((m, k), np.float32)
        for i in range(m):
            for j in range(k):
                g = self.groups[j]
                out[i, j] = scales[i, g] * np.float32(self.codes[i, j] - self.zeros[i, g])
        return out


def random_matrix(
    rng: np.random.Generator,
    m: int,
    k: int,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    act_order: bool = False,
) -> Matrix:
    """All codes and zero points there are; scales of either sign."""
    size = k if group_size == -1 else min(group_size, k)
    n_groups = -(-k // size)
    scales = rng.normal(0, 0.01, (m, n_groups)).astype(np.float16)
    zeros = rng.integers(0, 2**bits, (m, n_groups))
    groups = np.arange(k) // size
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    if act_order:
        groups = rng.permutation(groups)
    return Matrix(rng.integers(0, 2**bits, (m, k)), scales, zeros, groups, bits, group_size)


def stream(fields: NDArray[Any], bits: int) -> list[int]:
    """Words of one stream of bits, its lowest first."""
    number = 0
    for i, field in enumerate(fields):
        number |= int(field) << (i * bits)
    n_words = -(-len(fields) * bits // 32)
    return [number >> (32 * i) & 0xFFFFFFFF for i in range(n_words)]


def whole_words(fields: NDArray[Any], bits: int) -> list[int]:
    """Words that hold ``32 // bits`` fields each."""
    per_word = 32 // bits
    return [
        w for i in range(0, len(fields), per_word) for w in stream(fields[i : i + per_word], bits)
    ]


def as_int32(words: list[list[int]]) -> NDArray[np.int32]:
    return np.array(words, np.uint32).view(np.int32)


def gptq(w: Matrix, *, version: int = 1, g_idx: bool = True) -> Tensors:
    """qweight, qzeros, scales, g_idx. Version 1 takes 1 from every field of a word at once, as
    GPTQModel does, or of 3 bits from every field; then a field of 0 borrows from its neighbour."""
    zeros = [stream(column, w.bits) for column in w.zeros.T]
    if version == 1 and 32 % w.bits == 0:
        ones = sum(1 << i for i in range(0, 32, w.bits))
        zeros = [[(word - ones) % 2**32 for word in row] for row in zeros]
    elif version == 1:
        zeros = [stream((column - 1) % 2**w.bits, w.bits) for column in w.zeros.T]
    return {
        "qweight": as_int32([stream(row, w.bits) for row in w.codes]).T.copy(),
        "qzeros": as_int32(zeros),
        "scales": w.scales.T.copy(),
        **({"g_idx": w.groups.astype(np.int32)} if g_idx else {}),
    }


AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]
"""Which of 8 columns stands in each field of a word."""


def awq_gemm(w: Matrix) -> Tensors:
    def words(rows: NDArray[Any]) -> NDArray[np.int32]:
        return as_int32(
            [
                [stream(row[i : i + 8][AWQ_COLUMNS], 4)[0] for i in range(0, len(row), 8)]
                for row in rows
            ]
        )

    return {"qweight": words(w.codes.T), "qzeros": words(w.zeros.T), "scales": w.scales.T.copy()}


def padded(values: NDArray[Any], group_size: int) -> NDArray[Any]:
    """``[m, groups]`` filled up with zeros to the groups that AutoAWQ's kernels read."""
    step = 8 * {64: 2, 32: 4}.get(group_size, 1)
    return np.pad(values, ((0, 0), (0, -values.shape[1] % step)))


def awq_gemv(w: Matrix) -> Tensors:
    zeros = padded(w.zeros, w.group_size)
    return {
        "qweight": as_int32([stream(row, 4) for row in w.codes]),
        "qzeros": as_int32([stream(row, 4) for row in zeros]),
        "scales": padded(w.scales, w.group_size),
    }


def awq_fast(w: Matrix, *, zeros_name: str = "qzeros") -> Tensors:
    m, k = w.shape
    qweight = np.zeros((m // 4, k), np.uint16)
    for i in range(m):
        for j in range(k):
            pair, odd = divmod(j % 32, 2)
            place = pair % 4 * 8 + pair // 4 * 2 + odd  # pairs 0, 4, 8, 12, 1, ...
            eight, at = divmod(place, 8)
            place = eight * 8 + at // 2 + at % 2 * 4  # even columns, then odd ones
            place += j % 64 // 32 * 32
            word = j // 64 * 64 + i % 4 * 16 + place // 4
            qweight[i // 4, word] |= int(w.codes[i, j]) << (place % 4 * 4)
    offsets = -(w.scales.astype(np.float32) * w.zeros).astype(np.float16)
    return {
        "qweight": qweight.view(np.int16),
        "scales": padded(w.scales, w.group_size).T.copy(),
        zeros_name: padded(offsets, w.group_size).T.copy(),
    }


def pack_quantized(
    w: Matrix, *, symmetric: bool = False, old: bool = False, g_idx: bool = False
) -> Tensors:
    """Codes and zero points are signed, and stored with the middle added: as they are here."""
    words = whole_words if old else stream
    result: Tensors = {
        "weight_packed": as_int32([words(row, w.bits) for row in w.codes]),
        "weight_scale": w.scales,
        "weight_shape": np.array(w.shape, np.int64),
    }
    if not symmetric:
        zeros = as_int32([words(column, w.bits) for column in w.zeros.T])
        result["weight_zero_point"] = zeros.T.copy()
    if g_idx:
        result["weight_g_idx"] = w.groups.astype(np.int32)
    return result


def hqq(w: Matrix, zeros: NDArray[Any], *, settings: bool = True) -> Tensors:
    """With zero points ``[m, groups]`` of any real value."""
    m, k = w.shape
    size = k if w.group_size == -1 else w.group_size
    rows = w.codes.reshape(-1, size)
    per_word = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}[w.bits]
    field_bits = 3 if w.bits == 3 else 8 // per_word
    rows = np.pad(rows, ((0, -len(rows) % per_word), (0, 0)))
    blocks = np.split(rows, per_word)
    packed = sum(b << (field_bits * (per_word - 1 - i)) for i, b in enumerate(blocks))
    result: Tensors = {
        "W_q": np.asarray(packed).astype(np.int32 if w.bits == 3 else np.uint8),
        "scale": w.scales.reshape(-1, 1),
        "zero": zeros.reshape(-1, 1),
    }
    if settings:
        result["nbits"] = np.array(w.bits, np.int32)
        result["group_size"] = np.array(size, np.int32)
        result["axis"] = np.array(1, np.int32)
        result["shape"] = np.array([m, k], np.int64)
        result["packing"] = np.frombuffer(b"4bit_u8", np.uint8)
    return result


def with_zeros(w: Matrix, zeros: NDArray[Any]) -> Matrix:
    """The same with other zero points."""
    return replace(w, zeros=zeros)


def gptq_settings(bits: Any, group_size: int, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **changes}


def awq_settings(group_size: int, version: str, **changes: Any) -> dict[str, Any]:
    common = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
    return {**common, "version": version, **changes}


def packed_settings(
    bits: int, group_size: int, *, symmetric: bool, **changes: Any
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        **changes,
    }
