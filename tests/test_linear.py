"""LutLinear from NumPy to NumPy: every width against the dequantised matrix, inputs, refusals."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernel_cases import binary_coded
from tiny_model import write_tiny_model
from tmac_py import LutLinear, QuantTensor, mpgemm, quantize
from tmac_py.errors import OptionError
from tmac_py.quant import quantize_rtn, quantize_ternary

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RNG = np.random.default_rng(7)
BLOCK = 16  # weights per scale of an int8 table
F32 = np.float32


def weights(m: int, k: int) -> NDArray[np.float32]:
    return RNG.normal(size=(m, k)).astype(F32)


def bound(q: QuantTensor, x: NDArray[np.float32], tables: str) -> NDArray[np.float64]:
    """The most that ``y [n, m]`` may be from ``x w^T``.

    With int8 tables each entry (a signed sum of four activations) is off by half a step of
    max|entry| / 127 within its block. A weight is a sum over bit planes of ±2^b / 2, so that the
    tables of a block carry (2^bits - 1) / 2 scales per group of four activations, at most.
    With exact tables, an activation is off by half a step of max|x| / 2^13 within its row. Float32
    sums add k parts in 2^24 of all that is summed, block scales in fp16 one in 2^11.
    """
    w = q.dequantize().astype(np.float64)
    rows = np.abs(x.astype(np.float64))
    assert q.scales is not None
    scales = np.repeat(np.abs(q.scales.astype(np.float64)), q.group_size, axis=1)[:, : q.k]
    if tables == "exact":
        half = rows.max(axis=1, keepdims=True) / 2**13 / 2
        error = half * np.abs(w).sum(axis=1)
    else:
        padded = np.pad(rows, ((0, 0), (0, -q.k % BLOCK)))
        fours = padded.reshape(len(rows), -1, BLOCK // 4, 4).sum(axis=3)  # largest entries
        half = fours.max(axis=2) / 127 / 2
        per_weight = np.repeat(half, BLOCK, axis=1)[:, : q.k] / 4  # four weights share an entry
        error = per_weight @ (scales * (2**q.bits - 1) / 2).T
    small = rows @ (np.abs(w) + scales * 2**q.bits).T
    return error + small * (q.k * 2.0**-24 + (2.0**-11 if tables == "int8" else 0))


def product(q: QuantTensor, x: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(x, np.float64) @ q.dequantize().astype(np.float64).T


@pytest.mark.parametrize("tables", ["int8", "exact"])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_is_the_dequantised_product(bits: int, asym: bool, tables: Any) -> None:
    w, x = weights(70, 96), weights(5, 96)
    q = quantize_rtn(w, bits=bits, group_size=32, asym=asym)
    y = LutLinear(q, threads=2, tables=tables).forward(x)
    assert (y.shape, y.dtype) == ((5, 70), F32)
    error = np.abs(y - product(q, x))
    assert (error <= bound(q, x, tables)).all()
    assert error.max() > 0  # nothing multiplied in float32 behind our back


@pytest.mark.parametrize("tables", ["int8", "exact", "exact8"])
def test_ternary_matrices(tables: Any) -> None:
    w, x = weights(70, 100), weights(5, 100)
    q = quantize_ternary(w)
    linear = LutLinear(q, threads=2, tables=tables)
    assert linear.spec.encoding == "ternary"
    assert linear.nbytes == 3 * 768 + 64  # 32 * (4 * 5 + 3), rounded up to 64
    want = product(q, x)
    assert np.square(linear(x) - want).sum() <= 1e-4 * np.square(want).sum()


@pytest.mark.parametrize("tables", ["int8", "exact", "exact8"])
@pytest.mark.parametrize("n", [5, 40])
def test_binary_coded_matrices(n: int, tables: Any) -> None:
    w, x = weights(70, 96), weights(n, 96)
    q = binary_coded(quantize_rtn(w, bits=3, group_size=32, asym=True))
    linear = LutLinear(q, threads=2, tables=tables)
    assert linear.spec.encoding == "bcq"
    assert linear.nbytes == 3 * (96 * 12 + 3 * 4 * 64)
    want = product(q, x)
    assert np.square(linear(x) - want).sum() <= 1e-4 * np.square(want).sum()


@pytest.mark.parametrize("group_size", [4, 36, -1])
@pytest.mark.parametrize("k", [37, 63, 66])
def test_rows_of_any_length(k: int, group_size: int) -> None:
    w, x = weights(33, k), weights(2, k)
    linear = LutLinear.from_dense(w, bits=3, group_size=group_size, tables="exact", threads=1)
    q = quantize_rtn(w, bits=3, group_size=group_size, search="mse")
    assert linear.spec == q.spec
    assert linear.spec.group_size == (k if group_size == -1 else group_size)
    assert (np.abs(linear(x) - product(q, x)) <= bound(q, x, "exact")).all()


def test_a_matrix_may_have_any_layout_and_real_type() -> None:
    w = weights(40, 64)
    x = weights(3, 64)
    want = LutLinear.from_dense(w, bits=4, threads=1)(x)
    wide = np.zeros((40, 128), F32)
    wide[:, ::2] = w
    for same in (w.astype(np.float64), np.asfortranarray(w), wide[:, ::2], w.tolist()):
        assert np.array_equal(LutLinear.from_dense(same, bits=4, threads=1)(x), want)
    whole = np.round(w * 4).astype(np.int8)
    ours = LutLinear.from_dense(whole, bits=4, threads=1)(x)
    assert np.array_equal(ours, LutLinear.from_dense(whole.astype(F32), bits=4, threads=1)(x))


def test_activations_may_have_any_layout_and_real_type() -> None:
    linear = LutLinear.from_dense(weights(40, 64), bits=4, threads=1)
    x = weights(6, 64)
    want = linear(x)
    wide = np.zeros((6, 128), F32)
    wide[:, ::2] = x
    for same in (x.astype(np.float64), np.asfortranarray(x), wide[:, ::2], x[::-1][::-1]):
        assert np.array_equal(linear(same), want)
    assert np.array_equal(linear(x.reshape(2, 3, 64)), want.reshape(2, 3, 40))
    assert np.array_equal(linear(x.reshape(2, 3, 64).swapaxes(0, 1))[1, 0], want[1])
    assert np.array_equal(linear(x[4]), want[4])
    assert np.array_equal(linear(np.ones(64, np.int64)), linear(np.ones(64, F32)))
    assert (linear.forward(np.zeros((1, 64))) == 0).all()


def test_threads_and_rows_change_no_bit() -> None:
    w, x = weights(200, 96), weights(9, 96)
    want = LutLinear.from_dense(w, bits=2, threads=1)(x)
    for threads in (None, 2, 3):
        linear = LutLinear.from_dense(w, bits=2, threads=threads)
        assert np.array_equal(linear(x), want)
        assert np.array_equal(np.stack([linear(row) for row in x]), want)


def test_matrices_share_threads() -> None:
    one, two, other = (LutLinear.from_dense(np.ones((4, 8)), bits=4, threads=n) for n in (2, 2, 3))
    assert one._pool is two._pool
    assert other._pool is not one._pool


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tables": "int4"}, "tables is 'int4'; allowed: 'int8', 'exact'"),
        ({"threads": True}, "threads is True; allowed: 1 to 1024"),
        ({"threads": 0}, "threads is 0"),
        ({"bits": 0}, "bits is 0; allowed: 1 to 8"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": 2.5}, "bits is 2.5"),
        ({"group_size": 6}, "group_size 6: a multiple of 4, or -1 for the whole row"),
        ({"group_size": -2}, "group_size is -2"),
        ({"search": "best"}, "search 'best'"),
        ({"w": np.full((4, 8), np.nan)}, "weights are not finite"),
        ({"w": np.full((4, 8), np.inf)}, "weights are not finite"),
        ({"w": np.full((4, 8), 1e300)}, "weights are not finite"),
        ({"w": np.full((4, 8), 1e30)}, "exceeds the largest fp16"),
        ({"w": np.ones(8)}, r"shape \[8\]: a matrix"),
        ({"w": np.ones((0, 8))}, r"shape \[0, 8\]"),
        ({"w": np.ones((4, 8), complex)}, "w is of type complex128"),
        ({"w": [[1.0], [1.0, 2.0]]}, "w must be an array of real numbers"),
    ],
)
def test_arguments_are_checked_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        LutLinear.from_dense(**{"w": np.ones((4, 8)), "bits": 4, **options})


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.ones(7), r"x is \[7\]; allowed: \[\.\.\., 8\]"),
        (np.ones((8, 4)), r"x is \[8, 4\]"),
        (np.ones((0, 8)), r"x is \[0, 8\].*not empty"),
        (1.0, r"x is \[\]"),
        (["a"] * 8, "x is of type"),
    ],
)
def test_activations_that_do_not_fit(x: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        LutLinear.from_dense(np.ones((4, 8)), bits=4, threads=1)(x)


def test_the_constructor_checks_as_well() -> None:
    q = quantize_rtn(np.ones((4, 8), F32), bits=4, group_size=8)
    bad: Any
    for bad in ({"tables": "int4"}, {"threads": 1.5}):
        with pytest.raises(OptionError):
            LutLinear(q, **bad)


def test_packed_bytes_are_multiplied_where_they_are() -> None:
    w, x = weights(70, 96), weights(5, 96)
    q = quantize(w, bits=3, asym=True)
    one = LutLinear(q, threads=2)
    two = LutLinear.from_packed(one.packed, one.spec, threads=2)
    assert two.packed is one.packed
    assert two.nbytes == len(one.packed)
    assert np.array_equal(two(x), one(x))
    order = RNG.permutation(96).astype(np.int32)
    three = LutLinear.from_packed(one.packed, one.spec, order=order, threads=2)
    assert np.array_equal(three(x), one(x[:, order]))


def test_mpgemm_is_one_product() -> None:
    w, x = weights(70, 96), weights(6, 96).reshape(2, 3, 96)
    q = quantize(w, bits=2)
    for tables in ("int8", "exact"):
        linear = LutLinear(q, threads=2, tables=tables)
        want = linear(x)
        assert want.shape == (2, 3, 70)
        assert np.array_equal(mpgemm(x, q, threads=2, tables=tables), want)
        assert np.array_equal(
            mpgemm(x, (linear.packed, linear.spec), threads=1, tables=tables), want
        )


def test_packed_bytes_that_do_not_fit() -> None:
    linear = LutLinear(quantize(weights(70, 96), bits=3), threads=1)
    for given, kind in ((np.ones((2, 96)), "ndarray"), (linear, "LutLinear"), (None, "NoneType")):
        with pytest.raises(OptionError, match=f"weights is of type {kind}; allowed: a QuantTensor"):
            mpgemm(np.ones(96), given)
    with pytest.raises(OptionError, match="a packed matrix is bytes and LinearSpec; allowed"):
        mpgemm(np.ones(96), (linear.packed.tobytes(), linear.spec))
    with pytest.raises(OptionError, match="packed must be"):
        mpgemm(np.ones(96), (linear.packed[:-1], linear.spec))
    with pytest.raises(OptionError, match="order"):
        LutLinear.from_packed(linear.packed, linear.spec, order=np.zeros(96, np.int32))
    with pytest.raises(OptionError, match="tables is 'int4'"):
        LutLinear.from_packed(linear.packed, linear.spec, tables="int4")  # type: ignore[arg-type]


def test_the_blocks_in_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/linear.md").read_text()
    write_tiny_model(tmp_path / "model.lut")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if "torch" not in block:
            exec(block, names)
    y, q = names["y"], names["q"]
    assert (np.abs(y - product(q, names["x"])) <= bound(q, names["x"], "int8")).all()


def test_the_block_in_the_readme_runs() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    code = next(block for block in blocks if "LutLinear" in block)
    names: dict[str, Any] = {}
    exec(code, names)
    y, q = names["y"], quantize_rtn(names["w"], bits=4, group_size=64, search="mse")
    assert (y.shape, y.dtype) == ((1, 1024), F32)
    x = np.ones((1, 4096), F32)
    assert (np.abs(y - product(q, x)) <= bound(q, x, "int8")).all()
