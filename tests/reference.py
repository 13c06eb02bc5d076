"""The definition of what the core computes, in slow and obvious NumPy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tmac_py.quant import QuantTensor

REGION = 64
"""Weights along k that share one unit."""

CHUNKS, TABLES = REGION // 8, REGION // 4
"""Chunks of 8 weights and tables of 4 in a region."""

INT8_MAX = 127
"""The largest entry of an int8 table, and the largest activation of 8 bits."""

EXACT_MAX = 8128
"""`exact` rounds the activations of a table to at most this many steps."""

LIMIT_SUM = 85
"""A step of an int8 table has some units, as many as its own largest entry needs. The largest
entries of all tables of a region add up to at most so many times 127 units."""

MAX_MULTIPLIER = 15
"""The most units in a step of an int8 table."""

EXACT_MULTIPLIER = 4
"""A step of an `exact` table has at most so many units."""

TABLE_TOKENS = 16
"""The most tokens that are multiplied by table lookup."""

ROWS8 = "rows8"
"""The arithmetic of `int8` for more tokens: activations rounded to 8 bits per region, but the 4
with the largest among them to 14 bits: next to it the others would lose most of theirs."""

STEPS = {"int8": INT8_MAX, ROWS8: INT8_MAX, "exact": EXACT_MAX, "exact8": INT8_MAX}
"""How many steps the largest value of a table has at most."""

U = 2.0**-24
"""Largest relative error of one float32 operation."""

ENTRY_ERROR = INT8_MAX * 9 * U
"""How far an int8 entry before rounding may lie from the true one: the largest |x0|+..+|x3| takes
3 additions, the inverse of a step two divisions, an entry 2 levels of additions and one
multiplication: 8 U relative to at most 127, and one U to spare."""

ACTIVATION_ERROR = 4 * U
"""The same for an activation of exact tables, relative to the largest: two divisions and one
multiplication."""

SIGNS = np.array([[1 if e >> i & 1 else -1 for i in range(4)] for e in range(16)])
"""Entry e of a table is the sum of +x[i] where bit i of e is set and -x[i] elsewhere."""


def arithmetic(tables: str, n_tokens: int) -> str:
    """The arithmetic of the named tables in a product of that many tokens, a key of STEPS."""
    return ROWS8 if tables == "int8" and n_tokens > TABLE_TOKENS else tables


@dataclass(frozen=True)
class Product:
    """y [m] = dequantised matrix times x, and what its float32 evaluation may differ by."""

    y: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    """Sum of the magnitudes of everything that is added up to y."""
    undecided: NDArray[np.float64]
    """How far y moves if each rounding of an entry that is too close to call goes the other way."""
    integer_size: float
    """For integer x, power-of-two scales and offsets that are multiples of them, partial sums are
    multiples of a unit, and at most this many units large: below 2^24 float32 holds each exactly.
    Infinite for other x."""
    roundings: int
    """Roundings, at most, that one term goes through on its way into y."""

    @property
    def stays_exact(self) -> bool:
        """All partial sums are integers that float32 holds."""
        return self.integer_size < 2.0**24

    @property
    def tolerance(self) -> NDArray[np.float64]:
        """Bound on |float32 result - y|.

        A term that goes through N roundings is off by a factor of at most (1 + U)^N
        <= 1 + N U / (1 - N U), in whatever order the terms are added (Higham, Accuracy and
        Stability of Numerical Algorithms, section 3.1). Results below 2^-126 may lose up to
        2^-149 in each rounding, and are multiplied with scales of at most 65504 < 2^16 afterwards.
        """
        gamma = self.roundings * U / (1 - self.roundings * U)
        return self.undecided + gamma * (self.magnitude + self.undecided) + self.roundings * 2**-133


def chunked(q: QuantTensor) -> tuple[NDArray[np.int64], list[int]]:
    """Where the weights of a row go: positions [n_regions, CHUNKS, 8] along k (k itself: padding),
    and the first chunk of each group. A group starts a new chunk."""
    chunks: list[NDArray[np.int64]] = []
    first_of_group = []
    for begin in range(0, q.k, q.group_size):
        end = min(q.k, begin + q.group_size)
        first_of_group.append(len(chunks))
        chunks += [np.arange(at, at + 8) for at in range(begin, end, 8)]
        chunks[-1][chunks[-1] >= end] = q.k
    while len(chunks) % CHUNKS:
        chunks.append(np.full(8, q.k))
    return np.array(chunks).reshape(-1, CHUNKS, 8), first_of_group


def table_limits(x: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """What sets the step of each table of x [..., 4], in float32 like the core: its largest entry,
    or for exact tables its largest |x|."""
    size = np.abs(x)
    if kind != "int8":
        return np.asarray(size.max(-1))
    return np.asarray(size[..., 0] + size[..., 1] + size[..., 2] + size[..., 3])


def largest_multipliers(limits: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """Units in the largest step of each region, from the limits [n_regions, TABLES] of its tables.
    Float32 decides, in the core's operations: which side of a bound a region falls on matters."""
    if kind != "int8":
        most = EXACT_MULTIPLIER if kind == "exact" else 1
        return np.full(len(limits), most, np.float32)
    halves = limits.reshape(-1, 2, TABLES // 4, 2).swapaxes(2, 3)  # low nibbles' tables come first
    sums = np.cumsum(halves.reshape(-1, TABLES), axis=1, dtype=np.float32)[:, -1]
    fits = np.float32(LIMIT_SUM) * (limits.max(1) / sums)
    return np.clip(np.floor(fits), LIMIT_SUM // TABLES, MAX_MULTIPLIER).astype(np.float32)


def multipliers(limits: NDArray[np.float32], most: NDArray[np.float32]) -> NDArray[np.float64]:
    """Units in a step of each table, likewise."""
    wanted = limits * (most / limits.max(1))[:, None]
    return np.clip(np.rint(wanted + np.float32(0.5)), 1, most[:, None]).astype(np.float64)


def product(q: QuantTensor, x: NDArray[np.float32], kind: str) -> Product:
    """Dequantised q [m, k] times x [k], with arithmetic of that kind (a key of STEPS).

    What the core does in float32 is done in float64 here. docs/kernels.md describes the algorithm.
    """
    positions, first_of_group = chunked(q)
    n_regions = len(positions)
    codes = np.pad(q.codes, ((0, 0), (0, 1)))[:, positions].reshape(q.m, n_regions, TABLES, 4)
    given = np.append(x, np.float32(0))[positions].reshape(n_regions, TABLES, 4)
    half = 0 if kind == ROWS8 else (2**q.bits - 1) / 2  # ROWS8 takes codes as they are

    of_tables = table_limits(given, kind)
    limits = of_tables.max(1).astype(np.float64)
    if kind == "exact8":
        limits[:] = limits.max()
    elif kind == ROWS8:
        second = np.sort(of_tables, axis=1)[:, -2].astype(np.float64)
        limits = np.maximum(second, limits * INT8_MAX / EXACT_MAX)
    # Where the inverse of the unit would overflow, x counts as zero.
    scratch = of_tables.copy()
    scratch[limits < 2.0**-140] = 1
    largest = STEPS[kind] * largest_multipliers(scratch, kind).astype(np.float64)
    vanishing = limits < largest * 2.0**-120
    given[vanishing] = 0
    limits[vanishing] = of_tables[vanishing] = 1
    values = given.astype(np.float64)
    units = limits / largest
    steps = units[:, None] * np.ones(TABLES)  # [n_regions, TABLES]
    if kind in ("int8", "exact"):
        steps *= multipliers(of_tables, largest_multipliers(of_tables, kind))

    # For each row, region and table: sum of (code - half) * x; and of x for the rest of the code.
    if kind == "int8":
        entries = values @ SIGNS.T / steps[..., None]  # [n_regions, TABLES, 16]
        close = np.abs(entries - np.floor(entries) - 0.5) < ENTRY_ERROR
        sums = look_up(np.rint(entries), codes, q.bits) * steps
        slack = look_up(close.astype(np.float64), codes, q.bits) * steps
        x_slack = np.zeros((n_regions, TABLES))
    else:
        rounded = values / steps[..., None]
        error = np.abs(rounded).max() * ACTIVATION_ERROR
        near = np.abs(rounded - np.floor(rounded) - 0.5) < error
        values = np.rint(rounded) * steps[..., None]
        sums = ((codes - half) * values).sum(3)
        slack = (np.abs(codes - half) * near).sum(3) * steps
        x_slack = near.sum(2) * steps

    def per_group(tables_of: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., n_regions, TABLES] -> [..., n_groups]"""
        chunks = tables_of.reshape(*tables_of.shape[:-2], n_regions * CHUNKS, 2).sum(-1)
        total: NDArray[np.float64] = np.add.reduceat(chunks, first_of_group, axis=-1)
        return total

    # y = sum over groups of  scale * sums + shift * (sum of x)
    s = q.scales.astype(np.float64)
    offsets = np.zeros_like(s) if q.offsets is None else q.offsets.astype(np.float64)
    if q.offset_kind == "none":
        shift, shift_magnitude = s * (half - q.zero), np.abs(s * (half - q.zero))
    elif q.offset_kind == "zero":
        shift, shift_magnitude = s * (half - offsets), np.abs(s) * (half + np.abs(offsets))
    else:
        shift, shift_magnitude = s * half + offsets, np.abs(s) * half + np.abs(offsets)
    looked_up = np.abs(s) * per_group(np.abs(sums))
    x_sizes = per_group(np.abs(values).sum(2))
    # All groups before one, and the terms of that one before they cancel.
    partial_sums = (looked_up + np.abs(shift) * x_sizes).sum(1)
    partial_sums += (shift_magnitude * np.abs(per_group(values.sum(2)))).max(1)
    unit = smallest_unit(sums, values, s)
    return Product(
        y=(s * per_group(sums) + shift * per_group(values.sum(2))).sum(1),
        magnitude=(looked_up + shift_magnitude * x_sizes).sum(1),
        undecided=(np.abs(s) * per_group(slack) + np.abs(shift) * per_group(x_slack)).sum(1),
        integer_size=float(
            np.divide(partial_sums, unit, out=np.full(q.m, np.inf), where=unit > 0).max()
        ),
        # Within a region: 7 for a sum of 8 activations, 8 for that of its chunks, 9 for the steps,
        # 11 to convert, scale, shift and add an offset, 1 for the token's unit; then one addition
        # for each chunk and each group of the row.
        roundings=36 + CHUNKS * n_regions + q.n_groups,
    )


def look_up(
    entries: NDArray[np.float64], codes: NDArray[np.uint8], bits: int
) -> NDArray[np.float64]:
    """Sum over planes p of 2^(p-1) * entry: entries [n_regions, TABLES, 16] and
    codes [m, n_regions, TABLES, 4] -> [m, n_regions, TABLES]."""
    region, table = np.indices(entries.shape[:2])
    sums = np.zeros(codes.shape[:3])
    for plane in range(bits):
        index = (codes >> plane & 1) @ np.array([1, 2, 4, 8], np.uint8)
        sums += 2.0 ** (plane - 1) * entries[region, table, index]
    return sums


def smallest_unit(
    sums: NDArray[np.float64], values: NDArray[np.float64], scales: NDArray[np.float64]
) -> NDArray[np.float64]:
    """What integer terms are multiples of: half of what divides all doubled sums and all x, times
    the row's smallest scale [m]. 0 if x are not integers below 2^32."""
    if (np.abs(values) >= 2.0**32).any() or (values != np.rint(values)).any():
        return np.zeros(len(scales))
    divisor = np.gcd.reduce(np.append(2 * sums, values).astype(np.int64), initial=0)
    unit: NDArray[np.float64] = max(int(divisor), 1) / 2 * np.abs(scales).min(1)
    return unit


def multiply(q: QuantTensor, x: NDArray[np.float32], kind: str) -> NDArray[np.float64]:
    """y [m] of `product`."""
    return product(q, x, kind).y
