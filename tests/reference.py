"""The definition of what the core computes, in slow and obvious NumPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tmac_py.quant import QuantTensor


@dataclass(frozen=True)
class Cut:
    """How an encoding cuts a row: weights of a table, of a chunk, and of a region, whose
    activations share one unit."""

    table: int
    chunk: int
    region: int

    limit_sum: int
    """A step of an int8 table has some units, as many as its own largest entry needs. The largest
    entries of all tables of a region add up to at most so many times 127 units."""

    max_multiplier: int
    """The most units in a step of an int8 table."""

    sum_of_limits: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """Of the tables [n_regions, tables], in float32 and the core's order."""

    @property
    def chunks(self) -> int:
        """Of a region."""
        return self.region // self.chunk

    @property
    def tables(self) -> int:
        """Of a region."""
        return self.region // self.table


INT8_MAX = 127
"""The largest entry of an int8 table, and the largest activation of 8 bits."""

EXACT_MAX = 8128
"""`exact` rounds the activations of a table to at most this many steps."""

EXACT_MULTIPLIER = 4
"""A step of an `exact` table has at most so many units."""

TABLE_TOKENS = 16
"""The most tokens that are multiplied by table lookup."""

ROW_REGION = 64
"""Weights of a region in products of more."""

ROWS8 = "rows8"
"""The arithmetic of `int8` for more tokens: activations rounded to 8 bits with one unit for a
region, but the 4 with the largest, its loud quad, to 14 bits: next to it the others would lose most
of theirs. Where groups have as many weights two regions share their unit and two loud quads."""

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

TERNARY_FRACTIONS = 128
"""Activations of ternary int8 tables are rounded to so many parts of a step."""

TRITS = np.array([[e // 3**i % 3 - 1 for i in range(3)] for e in range(27)])
"""Ternary tables: the sums of three x, each times one of -1, 0 and 1."""

SIGNS = np.array([[1 if e >> i & 1 else -1 for i in range(4)] for e in range(16)])
"""Entry e of a table is the sum of +x[i] where bit i of e is set and -x[i] elsewhere."""


def serves_rows(q: QuantTensor) -> bool:
    """Products of q with many tokens multiply integers of 8 bits: those of planes with scales of
    their own look up tables, and those of ternary groups that do not begin with a region."""
    return q.encoding == "uniform" or (
        q.encoding == "ternary" and (q.n_groups == 1 or q.group_size % ROW_REGION == 0)
    )


def arithmetic(q: QuantTensor, tables: str, n_tokens: int) -> str:
    """The arithmetic of the named tables in a product of q and that many tokens, a key of STEPS."""
    one_plane = q.encoding == "uniform" and q.bits == 1  # tables are faster
    many = n_tokens > TABLE_TOKENS and serves_rows(q) and not one_plane
    return ROWS8 if tables == "int8" and many else tables


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


def cut_of(q: QuantTensor, kind: str) -> Cut:
    """How arithmetic of that kind cuts a row into regions. ROWS8 knows no ternary tables."""
    return PLANES if kind == ROWS8 else CUTS[q.encoding]


def shared_regions(q: QuantTensor) -> int:
    """How many regions of ROWS8 share a unit and their loud quads, if they are whole."""
    return 2 if q.n_groups == 1 or q.group_size % (2 * ROW_REGION) == 0 else 1


def units_of_rows8(
    of_quads: NDArray[np.float32], together: int, chunks: int
) -> NDArray[np.float64]:
    """What 127 units are in each region of ROWS8, from the largest |x| of its quads
    [n_regions, 16]; rows have `chunks` chunks."""
    whole = chunks // (PLANES.chunks * together) * together
    limits = np.empty(len(of_quads))
    for part, n in ((slice(0, whole), together), (slice(whole, None), 1)):
        falling = -np.sort(-of_quads[part].reshape(-1, n * PLANES.tables), axis=1).astype(
            np.float64
        )
        shared = np.maximum(falling[:, n], falling[:, 0] * INT8_MAX / EXACT_MAX)
        limits[part] = np.repeat(shared, n)
    return limits


def chunked(q: QuantTensor, kind: str) -> tuple[NDArray[np.int64], list[int], int]:
    """Where the weights of a row go: positions [n_regions, chunks, weights] along k (k itself:
    padding), the first chunk of each group, and the number of chunks without those that fill the
    last region. A group starts a new chunk."""
    cut = cut_of(q, kind)
    chunks: list[NDArray[np.int64]] = []
    first_of_group = []
    for begin in range(0, q.k, q.group_size):
        end = min(q.k, begin + q.group_size)
        first_of_group.append(len(chunks))
        chunks += [np.arange(at, at + cut.chunk) for at in range(begin, end, cut.chunk)]
        chunks[-1][chunks[-1] >= end] = q.k
    n_chunks = len(chunks)
    while len(chunks) % cut.chunks:
        chunks.append(np.full(cut.chunk, q.k))
    return np.array(chunks).reshape(-1, cut.chunks, cut.chunk), first_of_group, n_chunks


def table_limits(x: NDArray[np.float32], kind: str) -> NDArray[np.float32]:
    """What sets the step of each table of x [..., weights], in float32 like the core: its largest
    entry, or for exact tables its largest |x|."""
    size = np.abs(x)
    if kind != "int8":
        return np.asarray(size.max(-1))
    limits = np.zeros(x.shape[:-1], np.float32)
    for i in range(x.shape[-1]):
        limits += size[..., i]
    return limits


def largest_multipliers(limits: NDArray[np.float32], kind: str, cut: Cut) -> NDArray[np.float32]:
    """Units in the largest step of each region, from the limits [n_regions, tables] of its tables.
    Float32 decides, in the core's operations: which side of a bound a region falls on matters."""
    if kind != "int8":
        most = EXACT_MULTIPLIER if kind == "exact" else 1
        return np.full(len(limits), most, np.float32)
    fits = np.float32(cut.limit_sum) * (limits.max(1) / cut.sum_of_limits(limits))
    least = cut.limit_sum // cut.tables
    return np.clip(np.floor(fits), least, cut.max_multiplier).astype(np.float32)


def sum_by_halving(limits: NDArray[np.float32]) -> NDArray[np.float32]:
    """limits [n_regions, n] -> [n_regions]"""
    while limits.shape[1] > 1:
        limits = np.add(*np.split(limits, 2, axis=1))
    return limits[:, 0]


def sum_of_halves(limits: NDArray[np.float32]) -> NDArray[np.float32]:
    """limits [n_regions, 16] -> [n_regions]; of half a region, low nibbles' tables come first."""
    halves = limits.reshape(-1, 4, 2).swapaxes(1, 2).reshape(-1, 8)
    first, second = sum_by_halving(halves).reshape(-1, 2).T
    return np.asarray(first + second)


PLANES = Cut(4, 8, 64, 85, 15, sum_of_halves)
CUTS = {
    "uniform": PLANES,
    "bcq": PLANES,
    "ternary": Cut(3, 24, 96, 256, 127, sum_by_halving),
}


def multipliers(limits: NDArray[np.float32], most: NDArray[np.float32]) -> NDArray[np.float64]:
    """Units in a step of each table, likewise."""
    wanted = limits * (most / limits.max(1))[:, None]
    return np.clip(np.rint(wanted + np.float32(0.5)), 1, most[:, None]).astype(np.float64)


def product(q: QuantTensor, x: NDArray[np.float32], kind: str) -> Product:
    """Dequantised q [m, k] times x [k], with arithmetic of that kind (a key of STEPS). Tables and
    regions are those of x in the order of the codes' columns.

    What the core does in float32 is done in float64 here. docs/kernels.md describes the algorithm.
    """
    x = x if q.order is None else x[q.order]
    cut, ternary = cut_of(q, kind), q.encoding == "ternary"
    positions, first_of_group, n_chunks = chunked(q, kind)
    n_regions = len(positions)
    shape = (n_regions, cut.tables, cut.table)
    codes = np.pad(q.codes, ((0, 0), (0, 1)), constant_values=ternary)[:, positions]
    parts = parts_of(q, codes.reshape(q.m, *shape), centred=kind != ROWS8)
    given = np.append(x, np.float32(0))[positions].reshape(shape)

    of_tables = table_limits(given, kind)
    limits = of_tables.max(1).astype(np.float64)
    if kind == "exact8":
        limits[:] = limits.max()
    elif kind == ROWS8:
        limits = units_of_rows8(of_tables, shared_regions(q), n_chunks)
    # Where the inverse of the unit would overflow, x counts as zero.
    scratch = of_tables.copy()
    scratch[limits < 2.0**-140] = 1
    largest = STEPS[kind] * largest_multipliers(scratch, kind, cut).astype(np.float64)
    vanishing = limits < largest * 2.0**-120
    given[vanishing] = 0
    limits[vanishing] = of_tables[vanishing] = 1
    values = given.astype(np.float64)
    units = limits / largest
    steps = units[:, None] * np.ones(cut.tables)  # [n_regions, tables]
    if kind in ("int8", "exact"):
        steps *= multipliers(of_tables, largest_multipliers(of_tables, kind, cut))

    # For each row, region and table: sum of (code - half) * x; and of x for the rest of the code.
    if kind == "int8":
        entries, close = (ternary_entries if ternary else entries_of_signs)(
            values / steps[..., None]
        )
        x_slack = np.zeros((n_regions, cut.tables))
    else:
        rounded = values / steps[..., None]
        error = np.abs(rounded).max() * ACTIVATION_ERROR
        close = np.abs(rounded - np.floor(rounded) - 0.5) < error
        values = np.rint(rounded) * steps[..., None]
        x_slack = close.sum(2) * steps

    def sums_of(part: Part) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Those of a part, and how far they move if each close rounding goes the other way."""
        if kind == "int8":
            sums, slack = (part.look_up(e.astype(np.float64), part.codes) for e in (entries, close))
            return sums * steps, slack * steps
        distance = part.codes - part.half
        return (distance * values).sum(3), (np.abs(distance) * close).sum(3) * steps

    def per_group(tables_of: NDArray[np.float64]) -> NDArray[np.float64]:
        """[..., n_regions, tables] -> [..., n_groups]"""
        chunks = tables_of.reshape(*tables_of.shape[:-2], n_regions * cut.chunks, -1).sum(-1)
        total: NDArray[np.float64] = np.add.reduceat(chunks, first_of_group, axis=-1)
        return total

    # y = sum over groups of  (sum over parts of scale * sums) + shift * (sum of x)
    shift, shift_magnitude = shift_of(q, parts)
    x_sums, x_sizes = per_group(values.sum(2)), per_group(np.abs(values).sum(2))
    y, magnitude = shift * x_sums, shift_magnitude * x_sizes
    # All groups before one, and the terms of that one before they cancel.
    partial_sums = (np.abs(shift) * x_sizes).sum(1) + (shift_magnitude * np.abs(x_sums)).max(1)
    undecided = np.abs(shift) * per_group(x_slack)
    unit = np.full(q.m, np.inf)
    for part in parts:
        sums, slack = sums_of(part)
        looked_up = np.abs(part.scales) * per_group(np.abs(sums))
        y = y + part.scales * per_group(sums)
        magnitude = magnitude + looked_up
        partial_sums += looked_up.sum(1)
        undecided = undecided + np.abs(part.scales) * per_group(slack)
        unit = np.minimum(unit, smallest_unit(sums, values, part.scales))
    return Product(
        y=y.sum(1),
        magnitude=magnitude.sum(1),
        undecided=undecided.sum(1),
        integer_size=float(
            np.divide(partial_sums, unit, out=np.full(q.m, np.inf), where=unit > 0).max()
        ),
        # Within a region: 7 for a sum of 8 activations, 8 for that of its chunks, 9 for the steps,
        # 11 to convert, scale, shift and add an offset, 1 for the token's unit; then one addition
        # for each chunk, and one for each group of the row and part of its weights.
        roundings=36 + cut.chunks * n_regions + q.n_groups * len(parts),
    )


@dataclass(frozen=True)
class Part:
    """What weights consist of, but for their shift: scales * (codes - half)."""

    codes: NDArray[np.uint8]
    """[m, n_regions, tables, weights]"""
    half: float
    scales: NDArray[np.float64]
    """[m, n_groups], or [m, 1] for all groups"""
    look_up: Callable[[NDArray[np.float64], NDArray[np.uint8]], NDArray[np.float64]]
    """Sum of (codes - half) * x from the entries of tables of x."""


def parts_of(q: QuantTensor, codes: NDArray[np.uint8], *, centred: bool) -> list[Part]:
    """One, but for binary-coded weights: alpha * (2 * bit - 1) = 2 * alpha * (bit - 1/2) for each
    bit. Products that are not `centred` take codes as they are."""
    scales = np.full((q.m, 1), q.scale) if q.scales is None else q.scales.astype(np.float64)
    if q.encoding == "ternary":
        return [Part(codes, 1.0 if centred else 0.0, scales, look_up_trits)]
    if q.encoding == "uniform":
        half = (2**q.bits - 1) / 2 if centred else 0.0
        return [Part(codes, half, scales, partial(look_up_planes, bits=q.bits))]
    bits = [(codes >> p & 1).astype(np.uint8) for p in range(q.bits)]
    one = partial(look_up_planes, bits=1)
    return [Part(bit, 0.5, 2 * scales[..., p], one) for p, bit in enumerate(bits)]


def shift_of(q: QuantTensor, parts: list[Part]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What weights have besides their parts, [m, n_groups] or [m, 1], and the size of what adds up
    to it."""
    scales, half = parts[0].scales, parts[0].half
    offsets = np.zeros_like(scales) if q.offsets is None else q.offsets.astype(np.float64)
    if q.encoding == "bcq":
        return offsets, np.abs(offsets)
    if q.offset_kind == "none":
        return scales * (half - q.zero), np.abs(scales * (half - q.zero))
    if q.offset_kind == "zero":
        return scales * (half - offsets), np.abs(scales) * (half + np.abs(offsets))
    return scales * half + offsets, np.abs(scales) * half + np.abs(offsets)


def entries_of_signs(
    x: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Entries [..., 16] of int8 tables of x [..., 4] in steps, and which are too close to call."""
    entries = x @ SIGNS.T
    return np.rint(entries), np.abs(entries - np.floor(entries) - 0.5) < ENTRY_ERROR


def ternary_entries(
    x: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The same for ternary tables [..., 27] of x [..., 3]: x is rounded to TERNARY_FRACTIONS of a
    step, the sums of positive numbers to steps, half up; the others are opposite to them."""
    parts = x * TERNARY_FRACTIONS
    error = INT8_MAX * TERNARY_FRACTIONS * ACTIVATION_ERROR
    near = np.abs(parts - np.floor(parts) - 0.5) < error
    positive = TRITS * np.sign(np.arange(27) - 13)[:, None]
    sums = np.rint(parts) @ positive.T + TERNARY_FRACTIONS / 2
    either = near @ np.abs(TRITS).T
    lowest, entries, highest = (
        np.floor(sum_ / TERNARY_FRACTIONS) for sum_ in (sums - either, sums, sums + either)
    )
    return entries * np.sign(np.arange(27) - 13), lowest != highest


def look_up_trits(entries: NDArray[np.float64], codes: NDArray[np.uint8]) -> NDArray[np.float64]:
    """entries [n_regions, tables, 27] and codes [m, n_regions, tables, 3]
    -> [m, n_regions, tables]."""
    region, table = np.indices(entries.shape[:2])
    found: NDArray[np.float64] = entries[region, table, codes @ np.array([1, 3, 9], np.uint8)]
    return found


def look_up_planes(
    entries: NDArray[np.float64], codes: NDArray[np.uint8], bits: int
) -> NDArray[np.float64]:
    """Sum over planes p of 2^(p-1) * entry: entries [n_regions, tables, 16] and
    codes [m, n_regions, tables, 4] -> [m, n_regions, tables]."""
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
