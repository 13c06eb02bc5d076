"""The float work between matrix products, against its definition in float64.

Bounds count roundings: a result that went through N float32 operations is off by at most
gamma(N) times the sum of the magnitudes of its terms (see reference.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reference import U

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

EXP_ERROR = 2e-7
"""Relative error of the kernels' exponential, as csrc/kernels/vector_ops.inl promises."""

EXP_LOWEST = -87.0
"""The exponential of anything below counts as e^-87."""

TINY = 2.0**-126
"""Below the normal numbers rounding is absolute."""

SIZES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 100, 576)


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


@dataclass(frozen=True)
class VectorCase:
    """One call: fields and arrays in the order in which the program reads them, and the result."""

    name: str
    operation: str
    fields: tuple[int | float, ...]
    arrays: tuple[NDArray[Any], ...]
    want: NDArray[Any]
    tolerance: Doubles | float = 0.0

    def check(self, got: NDArray[Any]) -> None:
        undefined = np.isnan(self.want)
        np.testing.assert_array_equal(np.isnan(got), undefined, self.name)
        infinite = np.isinf(self.want)
        np.testing.assert_array_equal(got[infinite], self.want[infinite], self.name)
        finite = ~(undefined | infinite)
        off = np.abs(got[finite].astype(np.float64) - self.want[finite].astype(np.float64))
        allowed = np.broadcast_to(self.tolerance, self.want.shape)[finite]
        assert (off <= allowed).all(), f"{self.name}: off by {off}, allowed {allowed}"


def rms_norm(name: str, x: Floats, weight: Floats, eps: float) -> VectorCase:
    wide = x.astype(np.float64)
    with np.errstate(invalid="ignore"):
        want = wide / np.sqrt((wide**2).mean() + np.float32(eps)) * weight
    # Squares and their sum: n + 1 roundings of positive terms, then one each for the mean, eps,
    # the root (which halves what came before), its inverse and two products.
    tolerance = gamma(len(x) + 8) * np.abs(want) + TINY
    return VectorCase(name, "rms_norm", (len(x), eps), (x, weight), want, tolerance)


def silu_multiply(name: str, gate: Floats, up: Floats) -> VectorCase:
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        want = wide / (1 + np.exp(-wide)) * up
    want[np.isneginf(gate)] = np.where(up[np.isneginf(gate)] > 0, -np.inf, np.inf)
    # 1 + e^-g, the quotient and the product round once each; e^-g stops growing at g = -88.
    clamped = np.where(wide < -88, np.abs(wide * up) * np.exp(-87.9), 0)
    tolerance = (EXP_ERROR + gamma(3)) * np.abs(want) + clamped + TINY
    return VectorCase(name, "silu_multiply", (len(gate),), (gate, up), want, tolerance)


def gelu_tanh_multiply(name: str, gate: Floats, up: Floats) -> VectorCase:
    wide = gate.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        u = 2 * np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
        want = wide / (1 + np.exp(-u)) * up
        want[np.isneginf(gate)] = np.where(up[np.isneginf(gate)] > 0, -np.inf, np.inf)
        # u: both constants round, g^2, the fused sum and the product with g, each of positive
        # terms, so e^-u is off by gamma(5) |u| more; then as silu_multiply, whose e^-u stops too.
        relative = EXP_ERROR + gamma(3) + gamma(5) * np.minimum(np.abs(u), 90)
        clamped = np.where(u < -88, np.abs(wide * up) * np.exp(-87.9), 0)
        tolerance = relative * np.abs(want) + clamped + TINY
    return VectorCase(name, "gelu_tanh_multiply", (len(gate),), (gate, up), want, tolerance)


def relu2_multiply(name: str, gate: Floats, up: Floats) -> VectorCase:
    with np.errstate(over="ignore", invalid="ignore"):
        square = np.maximum(gate, np.float32(0)) ** 2  # NaN stays NaN
        want = square * up  # the same two roundings
    return VectorCase(name, "relu2_multiply", (len(gate),), (gate, up), want)


def soft_cap(name: str, x: Floats, cap: float) -> VectorCase:
    cap = float(np.float32(cap))
    with np.errstate(over="ignore", invalid="ignore"):
        want = cap * np.tanh(x.astype(np.float64) / cap)
        y = np.abs(x.astype(np.float64) / cap)
        # x / cap rounds once, which moves e^2y by 2y as much relative to itself and tanh by at most
        # y (1 - tanh^2) <= 0.5 of that; the exponential, 1 + e, the quotient q <= 2, 1 - q and the
        # product with cap: each is relative to a number of at most 2.
        tolerance = np.where(np.isfinite(y), cap * (2 * EXP_ERROR + 2 * gamma(5)), np.nan) + TINY
    tolerance = np.where(np.isinf(x), cap * 4 * U, tolerance)
    return VectorCase(name, "soft_cap", (len(x), cap), (x,), want, tolerance)


def sum_exponentials(name: str, x: Floats) -> VectorCase:
    largest = x.max()
    terms = np.exp(np.maximum(x.astype(np.float64) - float(largest), EXP_LOWEST))
    want = np.array([terms.sum()])
    # A difference rounds once, which moves its term by as much as it is large; then n additions.
    in_difference = gamma(1) * np.minimum(float(largest) - x.astype(np.float64), -EXP_LOWEST)
    tolerance = terms @ np.expm1(in_difference) + (EXP_ERROR + gamma(len(x) + 1)) * want
    return VectorCase(name, "sum_exponentials", (len(x), float(largest)), (x,), want, tolerance)


GATED = (silu_multiply, gelu_tanh_multiply, relu2_multiply)


def to_half_case() -> VectorCase:
    """Every half, what lies half-way to the next one, and that one's float32 neighbours."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves[-1] = 65536.0  # the next one, if the range went on
    middle = (halves[:-1] + halves[1:]) / 2
    x = np.concatenate([halves, middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf)])
    x = np.concatenate([x, -x, [np.nan, np.inf, -np.inf, 3e38, 1e-45]]).astype(np.float32)
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    return VectorCase("every half", "to_half", (len(x),), (x,), want)


def half_to_float_case() -> VectorCase:
    """One position has all the weight: the output is its value, here every half there is."""
    values = np.arange(0x10000, dtype=np.uint32).astype(np.uint16).view(np.float16)
    zeros = np.zeros(len(values), np.float32)
    arrays = (np.array([0]), np.array([1]), zeros, zeros, values.astype(np.float32))
    fields = (0, 0, 1, len(values), 1, 0, 1.0, 0.0)
    return VectorCase("every half", "attend", fields, arrays, values.astype(np.float64))


def spoilt(x: NDArray[Any], index: Any, value: float = np.nan) -> NDArray[Any]:
    out: NDArray[Any] = x.copy()
    out[index] = value
    return out


def vector_cases() -> list[VectorCase]:
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> Floats:
        values: Floats = (rng.normal(size=shape) * scale).astype(np.float32)
        return values

    cases = [to_half_case(), half_to_float_case()]
    for n in SIZES:
        for scale in (1e-12, 1.0, 1e6):
            name = f"n={n} scale={scale}"
            cases.append(rms_norm(f"rms_norm {name}", normal(n, scale=scale), normal(n), 1e-5))
            for gated in GATED:
                x, y = normal(n, scale=20 * scale), normal(n)
                cases.append(gated(f"{gated.__name__} {name}", x, y))
            cases.append(soft_cap(f"soft_cap {name}", normal(n, scale=scale), 30.0))
        for scale in (1.0, 30.0):
            cases.append(sum_exponentials(f"n={n} scale={scale}", normal(n, scale=scale)))
        x, y = normal(n), normal(n, scale=1e3)
        cases.append(VectorCase(f"add n={n}", "add", (n,), (x, y), x + y))
    gate = np.linspace(-100, 100, 4001, dtype=np.float32)
    for gated in GATED:
        cases.append(gated(f"{gated.__name__} everywhere", gate, np.ones_like(gate)))
    for cap in (0.5, 5.0, 50.0):
        cases.append(soft_cap(f"soft_cap {cap} everywhere", gate, cap))

    for n in (3, 17, 64):
        for at in (0, n - 1):
            x, weight = normal(n), normal(n)
            where = f"at {at} of {n}"
            cases.append(rms_norm(f"rms_norm NaN {where}", spoilt(x, at), weight, 1e-5))
            for value in (np.nan, np.inf, -np.inf):
                for gated in GATED:
                    name = f"{gated.__name__} {value} {where}"
                    cases.append(gated(name, spoilt(x, at, value), weight))
                cases.append(soft_cap(f"soft_cap {value} {where}", spoilt(x, at, value), 30.0))
            forbidden = spoilt(normal(n), at, -np.inf)
            cases.append(sum_exponentials(f"sum_exponentials -inf {where}", forbidden))
    return cases
