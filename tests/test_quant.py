"""QuantTensor and round-to-nearest against their definitions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from tmac_py import quant
from tmac_py.quant import (
    QuantTensor,
    bcq_tensor,
    quantize_rtn,
    quantize_ternary,
    ternary_tensor,
)

BITS = range(1, 9)
F16_STEP = 2.0**-11  # largest relative error of rounding to fp16
F16_TINY = 2.0**-25  # largest absolute error below the normal range


def weights(m: int = 33, k: int = 96, seed: int = 0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_t(4, (m, k)) * 0.05).astype(np.float32)


def per_column(q: QuantTensor, values: NDArray[np.float16]) -> NDArray[np.float64]:
    return np.repeat(values.astype(np.float64), q.group_size, axis=1)[:, : q.k]


@pytest.mark.parametrize("kind", ["none", "zero", "offset"])
@pytest.mark.parametrize(("k", "group_size"), [(64, 16), (60, 32), (20, 20)])
def test_dequantize_is_the_definition(kind: str, k: int, group_size: int) -> None:
    rng = np.random.default_rng(1)
    groups = -(-k // group_size)
    codes = rng.integers(0, 16, (3, k), np.uint8)
    scales = rng.normal(size=(3, groups)).astype(np.float16)
    offsets = None if kind == "none" else rng.normal(size=(3, groups)).astype(np.float16)
    q = QuantTensor(codes, scales, offsets, 4, group_size, kind, 8.0)  # type: ignore[arg-type]
    got = q.dequantize()
    assert got.dtype == np.float32
    for i in range(3):
        for j in range(k):
            s, c = np.float32(scales[i, j // group_size]), np.float32(codes[i, j])
            o = np.float32(8 if offsets is None else offsets[i, j // group_size])
            want = s * c + o if kind == "offset" else s * (c - o)
            assert got[i, j] == want


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("group_size", [32, 40, -1])
def test_every_weight_is_within_half_a_step(bits: int, asym: bool, group_size: int) -> None:
    w = weights()
    q = quantize_rtn(w, bits=bits, group_size=group_size, asym=asym)
    step = np.abs(per_column(q, q.scales))
    # Beyond half a step only the rounding of scale and offset to fp16, which moves the ends.
    slack = (2**bits - 1) * (step * F16_STEP + F16_TINY) + 1e-6 * np.abs(w)
    if q.offsets is not None:
        slack += np.abs(per_column(q, q.offsets)) * F16_STEP + F16_TINY
    if bits == 1 and not asym:  # two levels, both at the farther end: nothing in between
        step = 2 * step
    assert (np.abs(q.dequantize() - w) <= step / 2 + slack).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("asym", [False, True])
def test_codes_are_the_nearest_ones(bits: int, asym: bool) -> None:
    w = weights(8, 64)
    q = quantize_rtn(w, bits=bits, group_size=32, asym=asym, search="mse")
    scales = per_column(q, q.scales)
    base = per_column(q, q.offsets) if q.offsets is not None else -scales * q.zero
    levels = base[..., None] + scales[..., None] * np.arange(2**bits)  # [m, k, codes]
    best = np.abs(levels - w[..., None]).min(axis=2)
    assert np.allclose(np.abs(q.dequantize() - w), best, atol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("asym", [False, True])
def test_mse_is_never_worse_in_any_group(bits: int, asym: bool) -> None:
    w = weights(16, 96)

    def group_errors(search: quant.Search) -> NDArray[np.float32]:
        q = quantize_rtn(w, bits=bits, group_size=32, asym=asym, search=search)
        error: NDArray[np.float32] = ((q.dequantize() - w) ** 2).reshape(16, 3, 32)
        return np.asarray(error.sum(axis=2))

    minmax, mse = group_errors("minmax"), group_errors("mse")
    assert (mse <= minmax * (1 + 1e-5)).all()
    if bits <= 3:
        assert mse.sum() < 0.9 * minmax.sum()


def test_weights_on_the_grid_come_back_exactly() -> None:
    codes = np.tile(np.arange(16, dtype=np.float32), (4, 2))
    for asym, w in ((False, (codes - 8) * 0.125), (False, (8 - codes) * 0.125), (True, codes / 4)):
        q = quantize_rtn(w.astype(np.float32), bits=4, group_size=16, asym=asym, search="mse")
        assert np.array_equal(q.dequantize(), w)
        assert q.offset_kind == ("offset" if asym else "none")


def test_rows_and_groups_are_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(40, 100)
    whole = quantize_rtn(w, bits=3, group_size=32, asym=True, search="mse")
    monkeypatch.setattr(quant, "_CHUNK_ELEMENTS", 256)
    assert [s.stop for s in quant.row_chunks(5, 100, 256)] == [2, 4, 5]
    parts = [
        quantize_rtn(w[i : i + 1], bits=3, group_size=32, asym=True, search="mse")
        for i in range(40)
    ]
    assert np.array_equal(whole.codes, np.vstack([p.codes for p in parts]))
    assert np.array_equal(whole.scales, np.vstack([p.scales for p in parts]))
    ragged = quantize_rtn(w[:, 96:], bits=3, group_size=4, asym=True, search="mse")
    assert np.array_equal(whole.codes[:, 96:], ragged.codes)


def test_a_lazy_matrix_is_read_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(100, 64)
    sizes = []

    class Lazy:
        shape = w.shape

        def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
            sizes.append(rows.stop - rows.start)
            return w[rows]

    monkeypatch.setattr(quant, "_MINMAX_ELEMENTS", 16 * 64)
    lazy = quantize_rtn(Lazy(), bits=4, group_size=32)
    assert sorted(sizes) == [4] + [16] * 6  # in any order: threads
    assert np.array_equal(lazy.codes, quantize_rtn(w, bits=4, group_size=32).codes)


@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("value", [0.0, 0.25, -0.25, 1e-9, 60000.0])
def test_constant_groups(asym: bool, search: quant.Search, value: float) -> None:
    q = quantize_rtn(
        np.full((2, 8), value, np.float32), bits=4, group_size=8, asym=asym, search=search
    )
    assert np.allclose(q.dequantize(), value, rtol=F16_STEP, atol=F16_TINY * 16)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = weights(4, 32)
    w[2, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize_rtn(w, bits=4, group_size=32)


def test_fp16_overflow_is_refused() -> None:
    w = np.array([[1e6, -1e6, 0, 0]], np.float32)
    with pytest.raises(ValueError, match="65504"):
        quantize_rtn(w, bits=4, group_size=4)
    with pytest.raises(ValueError, match="65504"):
        quantize_rtn(w, bits=4, group_size=4, asym=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bits": 0, "group_size": 32}, "bits 0"),
        ({"bits": 9, "group_size": 32}, "bits 9"),
        ({"bits": 4, "group_size": 6}, "group_size 6"),
        ({"bits": 4, "group_size": 0}, "group_size 0"),
        ({"bits": 4, "group_size": 32, "search": "best"}, "search"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        quantize_rtn(weights(2, 64), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[m, k\]"):
        quantize_rtn(np.zeros(8, np.float32), bits=4, group_size=4)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bits": 2}, "does not fit in 2 bits"),
        ({"group_size": 4}, "scales"),
        ({"group_size": 64}, "exceeds k"),
        ({"scales": np.ones((2, 2), np.float32)}, "float32"),
        ({"offset_kind": "zero"}, "contradict"),
        ({"offsets": np.ones((2, 2), np.float16)}, "contradict"),
        ({"codes": np.zeros((2, 16), np.int8)}, "int8"),
        ({"offset_kind": "min"}, "offset_kind"),
    ],
)
def test_a_quant_tensor_checks_itself(changes: dict[str, object], text: str) -> None:
    good: dict[str, object] = {
        "codes": np.full((2, 16), 7, np.uint8),
        "scales": np.ones((2, 2), np.float16),
        "offsets": None,
        "bits": 3,
        "group_size": 8,
        "offset_kind": "none",
        "zero": 4.0,
    }
    spec = QuantTensor(**good).spec  # type: ignore[arg-type]
    assert (spec.m, spec.k, spec.bits, spec.group_size, spec.zero) == (2, 16, 3, 8, 4.0)
    with pytest.raises(ValueError, match=text):
        QuantTensor(**{**good, **changes})  # type: ignore[arg-type]


def test_ternary_rounding_is_that_of_bitnet() -> None:
    w = weights(33, 100)
    q = quantize_ternary(w)
    scale = np.abs(w.astype(np.float64)).mean()
    assert np.array_equal(q.codes, np.clip(np.rint(w / scale), -1, 1) + 1)
    assert q.scales is None
    assert q.scale == np.float32(scale)
    assert (q.spec.layout, q.spec.encoding, q.group_size) == ("trits3-m32", "ternary", 100)
    assert np.array_equal(q.dequantize(), (q.codes - np.float32(1)) * np.float32(q.scale))
    given = quantize_ternary(w, scale=0.25)
    assert given.scale == 0.25
    assert np.array_equal(given.codes, np.clip(np.rint(w * 4), -1, 1) + 1)
    assert (quantize_ternary(np.zeros((3, 8), np.float32)).dequantize() == 0).all()


@pytest.mark.parametrize(
    ("w", "text"),
    [
        (np.array([[1, np.nan]], np.float32), "not finite"),
        (np.array([[1, np.inf]], np.float32), "not finite"),
        (np.ones(8, np.float32), r"\[m, k\]"),
    ],
)
def test_ternary_rounding_refuses(w: NDArray[np.float32], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        quantize_ternary(w)


def test_a_ternary_tensor_checks_itself() -> None:
    q = ternary_tensor(np.full((2, 16), 2, np.uint8), np.ones((2, 2), np.float16), group_size=8)
    assert (q.dequantize() == 1).all()
    for changes, text in (
        ({"codes": np.full((2, 16), 3, np.uint8)}, "codes 0, 1 and 2"),
        ({"bits": 4}, "bits 2"),
        ({"zero": 2.0}, "zero 1"),
        ({"encoding": "binary"}, "encoding"),
        ({"scale": 1.0}, "either scales, or one scale"),
        ({"scales": None}, "either scales, or one scale"),
        ({"scales": None, "scale": 1.0}, "group_size k"),
        ({"scales": None, "scale": 0.1, "group_size": 16}, "a finite float32"),
    ):
        with pytest.raises(ValueError, match=text):
            replace(q, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", range(1, 5))
@pytest.mark.parametrize(("k", "group_size"), [(64, 16), (60, 32), (20, 20)])
def test_binary_codes_mean_sums_of_signed_scales(bits: int, k: int, group_size: int) -> None:
    rng = np.random.default_rng(bits)
    groups = -(-k // group_size)
    codes = rng.integers(0, 2**bits, (3, k), np.uint8)
    scales = rng.normal(size=(3, groups, bits)).astype(np.float16)
    offsets = rng.normal(size=(3, groups)).astype(np.float16)
    q = bcq_tensor(codes, scales, offsets, group_size=group_size)
    assert (q.spec.layout, q.spec.encoding, q.bits) == ("bcq-m32", "bcq", bits)
    got = q.dequantize()
    assert got.dtype == np.float32
    for i in range(3):
        for j in range(k):
            want = np.float32(0)
            for p in range(bits):
                scale = np.float32(scales[i, j // group_size, p])
                want = want + scale if codes[i, j] >> p & 1 else want - scale
            assert got[i, j] == want + np.float32(offsets[i, j // group_size])


def test_a_binary_coded_tensor_checks_itself() -> None:
    q = bcq_tensor(
        np.full((2, 16), 7, np.uint8),
        np.ones((2, 2, 3), np.float16),
        np.ones((2, 2), np.float16),
        group_size=8,
    )
    assert (q.dequantize() == 4).all()
    for changes, text in (
        ({"codes": np.full((2, 16), 8, np.uint8)}, "does not fit in 3 bits"),
        ({"scales": np.ones((2, 2), np.float16)}, r"scales float16\[2, 2\]: float16\[2, 2, 3\]"),
        ({"scales": np.ones((2, 2, 4), np.float16)}, r"float16\[2, 2, 3\]"),
        ({"scales": np.ones((2, 2, 3), np.float32)}, "float32"),
        ({"offsets": None}, "contradict"),
        ({"offset_kind": "none", "offsets": None}, "offset_kind 'offset'"),
        ({"offset_kind": "zero"}, "offset_kind 'offset'"),
        ({"zero": 1.0}, "zero 0"),
        ({"bits": 5, "scales": np.ones((2, 2, 5), np.float16)}, "bits 1 to 4"),
        (
            {
                "scales": None,
                "scale": 1.0,
                "group_size": 16,
                "offsets": np.ones((2, 1), np.float16),
            },
            "one scale needs a ternary matrix",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            replace(q, **changes)
    alone = bcq_tensor(q.codes, q.scales[:, :1], q.offsets[:, :1])  # type: ignore[index]
    assert alone.group_size == 16
