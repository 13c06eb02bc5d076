"""Attention over a cache of each type, against its definition in float64.

The codes of a quantised cache are defined by float32 operations in a fixed order, so the reference
has exactly those codes; what the kernels round after that is bounded (see vector_cases.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vector_cases import EXP_ERROR, EXP_LOWEST, TINY, Doubles, Floats, VectorCase, gamma, spoilt

KvType = Literal["f16", "int8", "int4"]

KV_TYPES: tuple[KvType, ...] = ("f16", "int8", "int4")
"""In the order of the core's enum KvType."""

GROUP = 32
BLOCK = 64
"""Numbers that share a range; positions whose weights are brought to a new maximum together."""


SMALLER = (0.95, 0.9, 0.85, 0.8, 0.75)
"""Ranges that 4 bits try, as shares of that from the lowest number to the highest."""


def rotation_run(head_dim: int) -> int:
    return head_dim & -head_dim


def rotate(x: Floats) -> Floats:
    """Rows times the orthogonal Walsh-Hadamard matrix, in the core's order of operations."""
    run = rotation_run(x.shape[-1])
    out = x.astype(np.float32)
    half = 1
    while half < run:
        pairs = out.reshape(*x.shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        out = np.stack([a + b, a - b], axis=-2).reshape(x.shape)
        half *= 2
    norm = np.float32(1) / np.sqrt(np.float32(run))
    return out * norm


@dataclass(frozen=True)
class Stored:
    """Rows as a cache of some type holds them, padded to whole groups."""

    values: Doubles
    terms: Doubles
    """Upper bounds of the magnitudes that the kernels add up in place of each value."""


@dataclass(frozen=True)
class Ranges:
    """Of groups of numbers, each array [..., 1]: what codes [0, most] stand for."""

    scale: Floats
    low: Floats

    def codes(self, groups: Floats, most: np.float32) -> Floats:
        inverse = np.where(self.scale > 0, np.float32(1) / self.scale, np.float32(0))
        codes: Floats = np.rint(np.clip((groups - self.low) * inverse, 0, most))
        return codes

    def errors(self, groups: Floats, most: np.float32) -> Floats:
        """Squared errors [..., 1] in the core's order of operations: 16 lanes, then halves."""
        squares = (groups - (self.codes(groups, most) * self.scale + self.low)) ** 2
        while squares.shape[-1] > 1:
            half = squares.shape[-1] // 2
            squares = squares[..., :half] + squares[..., half:]
        return squares


def narrowed(groups: Floats, most: np.float32, share: float) -> Ranges:
    """A part of the range of each group, around its middle, as binary16 holds it."""
    lowest, highest = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    half = np.float32(0.5)
    middle, reach = half * (lowest + highest), half * (highest - lowest)
    part = np.float32(share) * reach
    scale, low = part * (np.float32(2) / most), middle - part
    return Ranges(*(x.astype(np.float16).astype(np.float32) for x in (scale, low)))


def stored(x: Floats, kind: KvType, near: int) -> Stored:
    """Rows of ``x``, those from ``near`` on in fp16."""
    n, head_dim = x.shape
    padded = np.zeros((n, -(-head_dim // GROUP) * GROUP), np.float32)
    padded[:, :head_dim] = x if kind == "f16" else rotate(x)
    with np.errstate(over="ignore"):
        halves = padded.astype(np.float16).astype(np.float64)
    if kind == "f16":
        return Stored(halves, np.abs(halves))
    most = np.float32(255 if kind == "int8" else 15)
    groups = padded.reshape(n, -1, GROUP)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ranges = narrowed(groups, most, 1)
        least = ranges.errors(groups, most)
        for share in SMALLER if kind == "int4" else ():
            other = narrowed(groups, most, share)
            error = other.errors(groups, most)
            better = error < least
            ranges = Ranges(
                np.where(better, other.scale, ranges.scale), np.where(better, other.low, ranges.low)
            )
            least = np.where(better, error, least)
        numbers = ranges.codes(groups, most) * ranges.scale.astype(np.float64)
        values = (numbers + ranges.low).reshape(n, -1)
        terms = (numbers + np.abs(ranges.low)).reshape(n, -1)
    # What binary16 does not hold makes the whole group NaN.
    held = (np.abs(groups) <= np.finfo(np.float16).max).all(-1, keepdims=True)
    bad = np.broadcast_to(~held, groups.shape).reshape(n, -1)
    values[bad] = np.nan
    terms[bad] = np.nan
    values[near:], terms[near:] = halves[near:], np.abs(halves[near:])
    return Stored(values, terms)


def asked(q: Floats, kind: KvType, dims: int) -> Doubles:
    out = np.zeros((len(q), dims))
    out[:, : q.shape[1]] = q if kind == "f16" else rotate(q)
    return out


def unrotate(x: Doubles, tolerance: Doubles, head_dim: int) -> tuple[Doubles, Doubles]:
    """Rows of a rotated result and its tolerance, turned back; rounding on the way included."""
    run = rotation_run(head_dim)
    matrix = np.ones((1, 1))
    while len(matrix) < run:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    parts, allowed = x[:, :head_dim].reshape(len(x), -1, run), tolerance[:, :head_dim]
    back = parts @ matrix / np.sqrt(run)
    reach = allowed.reshape(parts.shape) + gamma(12) * np.abs(parts)
    spread = np.broadcast_to(reach.sum(-1, keepdims=True), parts.shape) / np.sqrt(run)
    return back.reshape(len(x), -1), spread.reshape(len(x), -1) * 1.001


def attend(
    name: str,
    q: Floats,
    keys: Floats,
    values: Floats,
    *,
    first: NDArray[np.int64] | None = None,
    end: NDArray[np.int64] | None = None,
    types: tuple[KvType, KvType] = ("f16", "f16"),
    near: int | None = None,
    softcap: float = 0.0,
) -> VectorCase:
    """Queries q [queries, head_dim] over positions [first, end) of keys and values [n, head_dim].

    Positions from ``near`` on (a multiple of 64; None: none of them) are read in fp16, whatever the
    types are. The result is [queries, head_dim].
    """
    n, head_dim = keys.shape
    scale = float(np.float32(head_dim**-0.5))
    first = np.zeros(len(q), np.int64) if first is None else first
    end = np.full(len(q), n, np.int64) if end is None else end
    with np.errstate(invalid="ignore", over="ignore"):
        near = -(-n // BLOCK) * BLOCK if near is None else near
        k, v = stored(keys, types[0], near), stored(values, types[1], near)
        wide = asked(q, types[0], k.values.shape[1])
        rows = [
            _row(wide[i], k, v, slice(int(first[i]), int(end[i])), scale, softcap)
            for i in range(len(q))
        ]
        want, tolerance = (np.stack(parts) for parts in zip(*rows, strict=True))
        if types[1] == "f16":
            want, tolerance = want[:, :head_dim], tolerance[:, :head_dim]
        else:
            want, tolerance = unrotate(want, tolerance, head_dim)
    kinds = tuple(KV_TYPES.index(kind) for kind in types)
    fields = (*kinds, n, head_dim, len(q), near, scale, softcap)
    arrays: tuple[NDArray[Any], ...] = (first, end, q, keys, values)
    return VectorCase(name, "attend", fields, arrays, want.ravel(), tolerance.ravel())


def _row(
    q: Doubles, k: Stored, v: Stored, positions: slice, scale: float, softcap: float
) -> tuple[Doubles, Doubles]:
    keys, values = k.values[positions], v.values[positions]
    n, dims = keys.shape
    products, terms = keys * q, k.terms[positions] * np.abs(q)
    scores = products.sum(1) * scale
    # The product, its scales and its zero, then the subtraction of the largest, over all blocks.
    in_score = gamma(dims + 16) * terms.sum(1).max() * scale
    if softcap:
        # tanh is no steeper than 1; its argument rounds three times, the result is off by a few
        # roundings of numbers up to 2 and by the exponential's error.
        in_score += gamma(3) * np.abs(scores).max() + softcap * (EXP_ERROR + gamma(8))
        scores = softcap * np.tanh(scores / softcap)
    spread_of_scores = float(np.ptp(scores))
    in_score += 2 * gamma(1) * min(spread_of_scores, -EXP_LOWEST)
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    want = shares @ values
    terms_of_values = shares @ np.abs(v.terms[positions])
    # Each weight and each sum is off by its exponential, and by one more for every block and part
    # that brings it down to a new maximum; then n additions.
    rescaled = n // BLOCK + 3
    relative = np.expm1(2 * in_score) + 2 * rescaled * (EXP_ERROR + gamma(2)) + gamma(2 * n + 8)
    largest = np.abs(v.terms[positions]).max(0)
    tolerance = 1.01 * relative * terms_of_values + 3 * n * np.exp(EXP_LOWEST) * largest + TINY
    return want, tolerance


def attention_cases() -> list[VectorCase]:
    """Types, sizes, windows, soft caps and groups of queries."""
    rng = np.random.default_rng(5)

    def normal(*shape: int, scale: float = 1.0) -> Floats:
        values: Floats = (rng.normal(size=shape) * scale).astype(np.float32)
        return values

    cases = [*spoilt_cases(rng)]
    for head_dim in (2, 4, 6, 16, 64, 80, 100, 128):
        for n in (1, 2, 3, 8, 16, 17, 63, 64, 65, 100, 300):
            for scale in (1.0, 10.0):  # 10: nearly all weight on one position
                q, keys = normal(1, head_dim, scale=scale), normal(n, head_dim, scale=scale)
                name = f"attend n={n} head_dim={head_dim} scale={scale}"
                cases.append(attend(name, q, keys, normal(n, head_dim)))
    for keys_type in KV_TYPES:
        for values_type in KV_TYPES:
            types = (keys_type, values_type)
            for head_dim in (6, 64, 96):
                for n, softcap in ((1, 0.0), (20, 2.0), (129, 0.0), (300, 50.0)):
                    name = f"attend {types} n={n} head_dim={head_dim} softcap={softcap}"
                    q, keys = normal(3, head_dim, scale=3), normal(n, head_dim, scale=2)
                    values = normal(n, head_dim)
                    near = None if n == 1 else n // BLOCK * BLOCK
                    case = attend(name, q, keys, values, types=types, near=near, softcap=softcap)
                    cases.append(case)
            cases.append(causal_case(rng, types, heads=1, tokens=11, window=0, n=290))
            cases.append(causal_case(rng, types, heads=3, tokens=7, window=70, n=600))
            cases.append(causal_case(rng, types, heads=4, tokens=8, window=5, n=70))
    return cases


def causal_case(
    rng: np.random.Generator,
    types: tuple[KvType, KvType],
    heads: int,
    tokens: int,
    window: int,
    n: int,
) -> VectorCase:
    """The last tokens of a sequence, each with several heads, before the last position."""
    end = np.repeat(np.arange(n - tokens + 1, n + 1), heads)
    first = np.maximum(0, end - window) if window else np.zeros_like(end)
    q, keys, values = (rng.normal(size=(m, 64)) for m in (heads * tokens, n, n))
    return attend(
        f"attend {types} heads={heads} tokens={tokens} window={window} n={n}",
        q.astype(np.float32),
        keys.astype(np.float32),
        values.astype(np.float32),
        first=first,
        end=end,
        types=types,
        near=int(end[0] - 1) // BLOCK * BLOCK,
    )


def spoilt_cases(rng: np.random.Generator) -> list[VectorCase]:
    """NaN in a query, in a key, in a value: what depends on it becomes NaN, nothing else."""
    cases = []
    for types in ((kind, kind) for kind in KV_TYPES):
        for n in (3, 17, 64):
            for at in (0, n - 1):
                q, keys, values = (rng.normal(size=(m, 64)).astype(np.float32) for m in (1, n, n))
                where = f"{types} at {at} of {n}"
                bad_q, bad_key = spoilt(q, (0, at % 64)), spoilt(keys, (at, 5))
                near = None if n == 17 else 0
                cases += [
                    attend(f"attend NaN in {what} {where}", *arrays, types=types, near=near)
                    for what, arrays in (
                        ("q", (bad_q, keys, values)),
                        ("key", (q, bad_key, values)),
                        ("value", (q, keys, spoilt(values, (at, 5)))),
                    )
                ]
    return cases


def alone(case: VectorCase) -> list[VectorCase]:
    """Each query of a case by itself."""
    kinds, (n, head_dim, count), rest = case.fields[:2], case.fields[2:5], case.fields[5:]
    first, end, q, keys, values = case.arrays
    parts = []
    for i in range(int(count)):
        own = slice(i, i + 1)
        fields = (*kinds, n, head_dim, 1, *rest)
        arrays = (first[own], end[own], q[own], keys, values)
        want = case.want.reshape(int(count), -1)[i]
        parts.append(VectorCase(f"{case.name}, query {i}", case.operation, fields, arrays, want))
    return parts
