"""Matrix products that every kernel must get right; run in this process and under emulators."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from reference import (
    EXACT_MAX,
    INT8_MAX,
    ROW_REGION,
    ROWS8,
    STEPS,
    Cut,
    Product,
    arithmetic,
    chunked,
    cut_of,
    largest_multipliers,
    product,
    shared_regions,
    table_limits,
)
from tmac_py.quant import QuantTensor, bcq_tensor, quantize_rtn, symmetric_zero, ternary_tensor
from tmac_py.spec import OffsetKind

TABLES = ("int8", "exact", "exact8")

TERNARY = 0
BCQ = range(-4, 0)
"""Stand for ternary codes among the bits, and for binary-coded weights of 4 to 1 bits."""

BITS = range(TERNARY, 9)

# Sizes to combine. The five lists are of coprime lengths: cycling through all of them at once
# meets every pair of two lists' values within the product of the two lengths.
KINDS: tuple[OffsetKind, ...] = ("none", "zero", "offset")
TOKENS = (1, 3, 5, 17, 24)
ROWS = (1, 31, 32, 33, 96, 2, 64)
COLUMNS = (4, 37, 60, 64, 68, 256, 1, 4096)
GROUPS = (4, 16, 20, 32, 48, 64, 128, 4096, 8, 12, 24)  # cut to k: the whole row
N_SHAPES = len(COLUMNS) * len(GROUPS)


@dataclass(frozen=True)
class LinearCase:
    """y [n, m] = x [n, k] times the transpose of q [m, k]."""

    name: str
    q: QuantTensor
    x: NDArray[np.float32]
    tables: str
    threads: int = 1
    exact: bool = False
    """All arithmetic stays within float32's integers: y must be equal, not close."""

    @property
    def arithmetic(self) -> str:
        return arithmetic(self.q, self.tables, len(self.x))

    @cached_property
    def products(self) -> list[Product | None]:
        """One for each token whose activations are finite."""
        finite = [bool(np.isfinite(x).all()) for x in self.x]
        return [
            product(self.q, x, self.arithmetic) if good else None
            for x, good in zip(self.x, finite, strict=True)
        ]

    @property
    def stays_exact(self) -> bool:
        return all(p is None or p.stays_exact for p in self.products)

    def check(self, y: NDArray[np.float32]) -> None:
        assert y.shape == (len(self.x), self.q.m)
        for token, (got, want) in enumerate(zip(y, self.products, strict=True)):
            where = f"{self.name}, token {token}"
            if want is None:
                assert np.isnan(got).all(), f"{where}: {got}"
            elif self.exact:
                np.testing.assert_array_equal(got, want.y, where)
            else:
                off = np.abs(got - want.y)
                assert (off <= want.tolerance).all(), (
                    f"{where}: off by {np.max(off / want.tolerance):.3g} times the bound"
                )


def integer_matrix(
    rng: np.random.Generator, m: int, k: int, bits: int, group_size: int, kind: OffsetKind
) -> QuantTensor:
    """Random codes; scales are a power of two for each row, of either sign in each group. Ternary
    matrices have no offsets: where others have, they have one scale, if they are of one group.
    Binary-coded weights always have offsets, and scales 1, 2, 4 or 8 times as large."""
    group_size = min(group_size, k)
    shape = (m, -(-k // group_size))
    if bits in BCQ:
        row = 2.0 ** rng.integers(-6, 5, (m, 1, 1))
        planes = rng.choice([-8, -4, -2, -1, 1, 2, 4, 8], (*shape, -bits))
        return bcq_tensor(
            rng.integers(0, 2**-bits, (m, k), np.uint8),
            (planes * row).astype(np.float16),
            (rng.integers(-7, 8, shape) * row[..., 0]).astype(np.float16),
            group_size=group_size,
        )
    scales = rng.choice([-1.0, 1.0], shape) * 2.0 ** rng.integers(-6, 7, (m, 1))
    if bits == TERNARY:
        codes = rng.integers(0, 3, (m, k), np.uint8)
        if kind == "offset" and group_size == k:
            return ternary_tensor(codes, float(scales[0, 0]))
        return ternary_tensor(codes, scales.astype(np.float16), group_size=group_size)
    centre = int(symmetric_zero(bits))
    offsets = None
    if kind == "zero":
        offsets = rng.integers(max(0, centre - 3), min(2**bits, centre + 4), shape)
    elif kind == "offset":
        offsets = -scales * rng.integers(centre - 3, centre + 4, shape)
    return QuantTensor(
        codes=rng.integers(0, 2**bits, (m, k), np.uint8),
        scales=scales.astype(np.float16),
        offsets=None if offsets is None else offsets.astype(np.float16),
        bits=bits,
        group_size=group_size,
        offset_kind=kind,
        zero=symmetric_zero(bits) if kind == "none" else 0.0,
    )


def integer_activations(
    rng: np.random.Generator, q: QuantTensor, kind: str, step: int, quiet: int, silent: int
) -> NDArray[np.float32]:
    """x [k] of integers, all multiples of `step`, whose regions have the unit 1, but for `silent`
    of 16, which are zero.

    In each region one value has the largest size there is: for int8 tables the sum of |x| of a
    table, for other arithmetic an |x|. For ROWS8 one in each loud quad, which are others, is up to
    8128 (that value itself if there are no other quads). The others are at most `quiet`.
    """
    x = np.append(rng.integers(-quiet // step, quiet // step, q.k, endpoint=True) * step, 0.0)
    cut = cut_of(q, kind)
    positions, _, n_chunks = chunked(q, kind)
    together = shared_regions(q) if kind == ROWS8 else 1
    whole = n_chunks // (cut.chunks * together) * together
    for region in [
        *positions[:whole].reshape(-1, together * cut.chunks, cut.chunk),
        *positions[whole:],
    ]:
        real = region[region < q.k]
        if len(real) == 0:
            continue
        if rng.integers(16) < silent:
            x[real] = 0
            continue
        at = rng.choice(real)
        tables = region.reshape(-1, cut.table)
        if kind == "int8":
            table = next(t for t in tables if at in t)
            sign = rng.choice([-1, 1])
            while not set_loudest(x, tables, table, at, sign, cut):
                x[region] //= 2  # with these around it no multiplier fits its table
        else:
            x[at] = STEPS[kind] * (4 if kind == "exact" else 1) * rng.choice([-1, 1])
        if kind == ROWS8:
            n_loud = region.size // ROW_REGION
            others = [t[t < q.k] for t in tables if at not in t and (t < q.k).any()]
            loud = max(INT8_MAX, 64 * quiet) if len(others) >= n_loud else EXACT_MAX
            chosen = rng.permutation(len(others))[:n_loud]
            for quad in [others[i] for i in chosen] if len(others) >= n_loud else [np.array([at])]:
                x[rng.choice(quad)] = loud * rng.choice([-1, 1])
    return x[:-1].astype(np.float32)


def set_loudest(
    x: NDArray[np.float64],
    region: NDArray[np.int64],
    table: NDArray[np.int64],
    at: int,
    sign: int,
    cut: Cut,
) -> bool:
    """Set x[at] so that the sum of |x| of its table is 127 times the region's largest multiplier,
    which follows from it; false if there is no such value."""
    x[at] = 0
    rest = np.abs(x[table]).sum()
    for most in range(cut.max_multiplier, 0, -1):
        x[at] = (STEPS["int8"] * most - rest) * sign
        limits = table_limits(x[region].astype(np.float32), "int8")[None]
        if abs(x[at]) + rest == limits.max() and largest_multipliers(limits, "int8", cut) == most:
            return True
    return False


def integer_case(
    rng: np.random.Generator, q: QuantTensor, tables: str, n: int, name: str
) -> LinearCase:
    """The loudest activations, and the finest, with which all sums stay exact."""
    kind = arithmetic(q, tables, n)
    loudest = {"int8": 100, "exact": 32512}.get(kind, 127)
    steps = (1, 8, 256) if kind == "exact" else (1,)  # 32512 = 127 * 256
    some_steps = steps if q.k <= 256 else steps[-1:]
    for step, silent in ((step, silent) for step in some_steps for silent in (0, 8, 14)):
        quiet = loudest
        while quiet >= step:
            x = [integer_activations(rng, q, kind, step, quiet, silent) for _ in range(n)]
            case = LinearCase(name, q, np.stack(x), tables, exact=True)
            if product(q, x[0], kind).stays_exact and case.stays_exact:
                return case
            quiet //= 4
    raise AssertionError(f"{name}: no activations keep the sums exact")


@cache
def integer_cases(tables: str, bits: int) -> list[LinearCase]:
    cases = []
    for i in range(N_SHAPES):
        kind, n, m = KINDS[i % 3], TOKENS[i % 5], ROWS[i % 7]
        k, group_size = COLUMNS[i % 8], GROUPS[i % 11]
        rng = np.random.default_rng([abs(bits), i])
        q = integer_matrix(rng, m, k, bits, group_size, kind)
        name = f"{kind} m={m} k={k} group_size={q.group_size} n={n}"
        cases.append(integer_case(rng, q, tables, n, name))
    return cases


def rounded_matrix(w: NDArray[np.float32], bits: int, group_size: int, asym: bool) -> QuantTensor:
    """Rounded to nearest; ternary ones have no offsets, and random scales, binary-coded ones uneven
    levels."""
    if bits in BCQ:
        q = binary_coded(quantize_rtn(w, bits=-bits, group_size=group_size, asym=True))
        return uneven(np.random.default_rng(w.shape[1]), q)
    if bits != TERNARY:
        return quantize_rtn(w, bits=bits, group_size=group_size, asym=asym)
    m, k = w.shape
    size = k if group_size == -1 else group_size
    scales = np.random.default_rng(k).uniform(0.01, 0.1, (m, -(-k // size)))
    codes = np.sign(w) * (np.abs(w) > np.abs(w).mean() / 2) + 1
    if asym and size == k:
        return ternary_tensor(codes.astype(np.uint8), float(scales[0, 0]))
    return ternary_tensor(codes.astype(np.uint8), scales.astype(np.float16), group_size=size)


def random_activations(rng: np.random.Generator, kind: str, n: int, k: int) -> NDArray[np.float32]:
    if kind == "gaussian":
        x = rng.normal(size=(n, k))
    elif kind == "heavy-tailed":
        x = rng.standard_t(3, (n, k))
    elif kind == "outlier":
        x = rng.normal(size=(n, k))
        x[np.arange(n), rng.integers(k, size=n)] = 1e30
    elif kind == "denormal":  # some blocks are too small for a table and count as zero
        x = rng.normal(size=(n, k)) * np.repeat(
            rng.choice([1e-39, 1e-30, 1e-36], (n, 128)), k // 128, 1
        )
    else:
        assert kind == "tiny and huge"
        x = rng.normal(size=(n, k)) * 10.0 ** rng.integers(-20, 20, (n, k))
    return x.astype(np.float32)


def binary_coded(q: QuantTensor) -> QuantTensor:
    """The same weights, but for rounding to fp16: u = (2**bits - 1) / 2 + sum of +-2**(p - 1)."""
    assert q.scales is not None
    assert q.offsets is not None
    scales = q.scales[..., None] * 2.0 ** np.arange(-1, q.bits - 1)
    offsets = q.offsets + q.scales * ((2**q.bits - 1) / 2)
    return bcq_tensor(
        q.codes,
        scales.astype(np.float16),
        offsets.astype(np.float16),
        group_size=q.group_size,
    )


def uneven(rng: np.random.Generator, q: QuantTensor) -> QuantTensor:
    """With scales of any size and sign."""
    assert q.scales is not None
    return replace(q, scales=(q.scales * rng.normal(size=q.scales.shape)).astype(np.float16))


@cache
def float_cases(tables: str, bits: int) -> list[LinearCase]:
    rng = np.random.default_rng(abs(bits))
    cases = []
    for kind in ("gaussian", "heavy-tailed", "outlier", "denormal", "tiny and huge"):
        for m, k, group_size, asym in (
            (33, 256, 64, False),
            (96, 1024, 20, True),
            (1, 4096, -1, True),
        ):
            w = rng.standard_t(4, (m, k)).astype(np.float32) * np.float32(0.05)
            q = rounded_matrix(w, bits, group_size, asym)
            for n in (3, 18):
                x = random_activations(rng, kind, n, k)
                cases.append(LinearCase(f"{kind} m={m} k={k} asym={asym} n={n}", q, x, tables))
    return cases


def extreme_codes(bits: int, k: int) -> NDArray[np.uint8]:
    """Rows of codes at the ends of their range: all upper, all lower, alternating both ways."""
    top = 2 if bits == TERNARY else 2 ** abs(bits) - 1
    rows = [[top, top], [0, 0], [top, 0], [0, top]]
    return np.array([np.resize(rows[r % 4], k) for r in range(33)], np.uint8)


def extreme_activations(k: int, largest: int, table: int) -> NDArray[np.float32]:
    """The same patterns in the signs of x, in every position and in one of each table: the sums
    of matching rows are the largest that accumulators meet."""
    signs = np.array([np.resize(p, k) for p in ([1, 1], [-1, -1], [1, -1], [-1, 1])])
    one_of_each = np.arange(k) % table == 0
    patterns = np.concatenate([signs, signs * one_of_each])
    return (patterns * largest).astype(np.float32)


@cache
def extreme_cases(tables: str, bits: int) -> list[LinearCase]:
    """Accumulators at their bounds, zeros, NaN and infinity."""
    cases = []
    kinds = KINDS if bits in BITS else KINDS[-1:]
    for kind, times in itertools.product(kinds, (1, 3)):
        for k, group_size in ((4096, 4096), (4096, 128), (4096, 16), (60, 20)):
            rng = np.random.default_rng(0)
            q = integer_matrix(rng, 33, k, bits, group_size, kind)
            q = replace(q, codes=extreme_codes(bits, k))
            # All tables of a region alike have the least multiplier of int8 tables.
            arithmetic_kind = arithmetic(q, tables, 8 * times)
            cut = cut_of(q, arithmetic_kind)
            loudest = {"int8": INT8_MAX * (cut.limit_sum // cut.tables), "exact": 32512}.get(
                arithmetic_kind, 127
            )
            x = extreme_activations(k, loudest, cut.table)
            name = f"extreme {kind} k={k} group_size={group_size} times={times}"
            cases.append(LinearCase(name, q, np.tile(x, (times, 1)), tables, exact=True))
            assert cases[-1].stays_exact, name
    q = integer_matrix(np.random.default_rng(1), 33, 4096, bits, 64, "zero")
    for n in (2, 18):
        cases.append(LinearCase("zeros", q, np.zeros((n, 4096), np.float32), tables, exact=True))
    return [*cases, *non_finite_cases(tables, bits)]


def non_finite_cases(tables: str, bits: int) -> Iterator[LinearCase]:
    """NaN and infinities in some tokens: these tokens are NaN, their neighbours as ever."""
    for k, group_size, n in ((4096, 64, 7), (37, 20, 7), (4096, 64, 19), (37, 20, 19)):
        rng = np.random.default_rng(abs(bits))
        q = integer_matrix(rng, 33, k, bits, group_size, "offset")
        good = integer_case(rng, q, tables, n, f"NaN and infinity k={k} n={n}")
        x = good.x.copy()
        for token, value, at in ((1, np.nan, 0), (3, np.inf, k // 2), (5, -np.inf, k - 1)):
            x[token, at] = value
        yield replace(good, x=x)


def invariance_cases(tables: str, bits: int) -> list[LinearCase]:
    """Ordinary floats in enough tiles and tokens to be dealt out to threads in many ways."""
    rng = np.random.default_rng(abs(bits))
    w = rng.normal(size=(300, 296)).astype(np.float32)
    x = random_activations(rng, "gaussian", 37, 296)
    return [
        LinearCase(f"invariance n={n} group_size={group_size}", q, x[:n], tables)
        for group_size in (48, 128, 296)
        for q in [rounded_matrix(w, bits, group_size, asym=True)]
        for n in (13, 37)
    ]


def few_tokens(tables: str, bits: int) -> list[LinearCase]:
    """Every number of tokens that gets the bits of single ones, with groups of half a region."""
    rng = np.random.default_rng(abs(bits) + 100)
    w = rng.normal(size=(70, 168)).astype(np.float32)
    x = random_activations(rng, "gaussian", 16, 168)
    q = rounded_matrix(w, bits, 32, asym=True)
    return [LinearCase(f"few tokens n={n}", q, x[:n], tables) for n in range(1, 17)]


def ordered(case: LinearCase) -> LinearCase:
    """The same product, of columns that multiply the activations in some other order."""
    order = np.random.default_rng(case.q.k).permutation(case.q.k).astype(np.int32)
    x = np.empty_like(case.x)
    x[:, order] = case.x
    return replace(case, name=f"{case.name} ordered", q=replace(case.q, order=order), x=x)


def pieces(case: LinearCase) -> list[LinearCase]:
    """The tokens of a case in smaller products whose definition is the same: together they must
    give the same bits. Token by token, but for int8 activations that are multiplied otherwise."""
    n = len(case.x)
    ends = range(1, n) if case.arithmetic == case.tables else [17]
    return [replace(case, x=x) for x in np.split(case.x, ends)]


def all_cases(tables: str, bits: int) -> list[LinearCase]:
    return [*integer_cases(tables, bits), *float_cases(tables, bits), *extreme_cases(tables, bits)]
