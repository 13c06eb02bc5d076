"""Every kernel x ISA x tables x bits against the NumPy reference, and packing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernel_cases import (
    BCQ,
    BITS,
    TABLES,
    TERNARY,
    LinearCase,
    binary_coded,
    extreme_cases,
    few_tokens,
    float_cases,
    integer_cases,
    integer_matrix,
    invariance_cases,
    ordered,
    pieces,
)
from tmac_py import _core
from tmac_py.quant import QuantTensor, ternary_tensor

ISAS = [row["name"] for row in _core.isas() if row["usable"]]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _core.active_isa()
    _core.use_isa(request.param)
    assert _core.active_isa() == request.param
    yield request.param
    _core.use_isa(before)


@pytest.fixture(scope="module")
def pool() -> _core.ThreadPool:
    return _core.ThreadPool(2)


def encoding(q: QuantTensor) -> dict[str, Any]:
    return {
        "bits": q.bits,
        "group_size": q.group_size,
        "offset_kind": q.offset_kind,
        "encoding": q.encoding,
        "scale": q.scale,
    }


def pack(q: QuantTensor) -> NDArray[np.uint8]:
    return _core.pack(q.codes, q.scales, q.offsets, **encoding(q))


def linear(q: QuantTensor) -> _core.Linear:
    return _core.Linear(pack(q), m=q.m, k=q.k, zero=q.zero, order=q.order, **encoding(q))


def run(case: LinearCase, pool: _core.ThreadPool) -> NDArray[np.float32]:
    return _core.linear_forward(linear(case.q), case.x, pool, tables=case.tables)  # type: ignore[arg-type]


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("bits", [*BITS, *BCQ])
@pytest.mark.usefixtures("isa")
class TestProduct:
    def test_integers_are_equal(self, tables: str, bits: int, pool: _core.ThreadPool) -> None:
        for case in integer_cases(tables, bits):
            case.check(run(case, pool))

    def test_floats_are_within_the_bound(
        self, tables: str, bits: int, pool: _core.ThreadPool
    ) -> None:
        for case in float_cases(tables, bits):
            case.check(run(case, pool))

    def test_extremes(self, tables: str, bits: int, pool: _core.ThreadPool) -> None:
        for case in extreme_cases(tables, bits):
            case.check(run(case, pool))

    def test_threads_and_tokens_change_no_bit(
        self, tables: str, bits: int, pool: _core.ThreadPool
    ) -> None:
        for case in invariance_cases(tables, bits):
            y = run(case, pool)
            case.check(y)
            for threads in (1, 3, 5):
                assert run(case, _core.ThreadPool(threads)).tobytes() == y.tobytes()
            apart = [run(piece, pool) for piece in pieces(case)]
            assert np.concatenate(apart).tobytes() == y.tobytes()

    def test_each_of_few_tokens_gets_what_it_gets_alone(
        self, tables: str, bits: int, pool: _core.ThreadPool
    ) -> None:
        *fewer, most = few_tokens(tables, bits)
        alone = np.concatenate([run(replace(most, x=row[None]), pool) for row in most.x])
        most.check(run(most, pool))
        for case in [*fewer, most]:
            assert run(case, pool).tobytes() == alone[: len(case.x)].tobytes(), case.name


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("bits", [*BITS, *BCQ])
def test_columns_in_another_order(tables: str, bits: int, pool: _core.ThreadPool) -> None:
    """Activations are gathered before any kernel sees them: one instruction set is enough."""
    for case in invariance_cases(tables, bits):
        other = ordered(case)
        for n in (1, 4, 17, len(case.x)):
            want = run(replace(case, x=case.x[:n]), pool)
            for threads in (1, 3):
                got = run(replace(other, x=other.x[:n]), _core.ThreadPool(threads))
                assert got.tobytes() == want.tobytes()
        few = replace(other, x=other.x[:2])
        few.check(run(few, pool))


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("bits", range(1, 5))
@pytest.mark.usefixtures("isa")
def test_uniform_weights_may_be_binary_coded(
    tables: str, bits: int, pool: _core.ThreadPool
) -> None:
    for case in integer_cases(tables, bits):
        if case.q.offset_kind == "offset" and case.arithmetic == tables:
            q = binary_coded(case.q)
            np.testing.assert_array_equal(q.dequantize(), case.q.dequantize())
            case.check(run(replace(case, q=q), pool))


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("bits", [*BITS, *BCQ])
def test_isas_agree_to_the_bit(tables: str, bits: int, pool: _core.ThreadPool) -> None:
    before = _core.active_isa()
    for case in invariance_cases(tables, bits):
        results = set()
        for isa in ISAS:
            _core.use_isa(isa)
            results.add(run(case, pool).tobytes())
        assert len(results) == 1
    _core.use_isa(before)


@pytest.mark.parametrize("tables", TABLES)
@pytest.mark.parametrize("bits", [2, TERNARY])
def test_sums_beyond_float32_are_not_finite(
    isa: str, tables: str, bits: int, pool: _core.ThreadPool
) -> None:
    q = integer_matrix(np.random.default_rng(0), 1, 64, bits, 64, "none")
    q = replace(q, codes=np.full((1, 64), q.codes.max(), np.uint8))
    case = LinearCase("overflow", q, np.full((1, 64), 3e38, np.float32), tables)
    assert not np.isfinite(run(case, pool)).any(), isa


@pytest.mark.usefixtures("isa")
def test_multiply_peak_is_plausible(pool: _core.ThreadPool) -> None:
    assert 1e7 < _core.multiply_peak(pool) < 1e15


@pytest.mark.parametrize("kind", ["none", "zero", "offset"])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_returns_what_was_packed(kind: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for m in (1, 31, 32, 33, 96):
        for k, group_size in ((1, 1), (37, 20), (37, 37), (64, 16), (68, 64), (100, 4), (256, 48)):
            q = integer_matrix(rng, m, k, bits, group_size, kind)  # type: ignore[arg-type]
            packed = pack(q)
            assert packed.nbytes == _core.packed_nbytes(m, k, **encoding(q))
            assert packed.nbytes % 64 == 0
            codes, scales, offsets = _core.unpack(packed, m=m, k=k, **encoding(q))
            np.testing.assert_array_equal(codes, q.codes)
            for got, want in ((scales, q.scales), (offsets, q.offsets)):
                assert (got is None) == (want is None)
                np.testing.assert_array_equal(got, want)


def test_packed_bytes_follow_the_layout() -> None:
    """One chunk of a 3-bit matrix by hand: planes 0 and 1 of each row, then plane 2 of each row."""
    codes = np.zeros((2, 8), np.uint8)
    codes[1] = [0, 1, 2, 3, 4, 5, 6, 7]
    packed = _core.pack(
        codes, np.array([[1], [2]], np.float16), bits=3, group_size=8, offset_kind="none"
    )
    want = np.zeros(192, np.uint8)  # 32 rows x 3 planes, 32 scales, rounded up to 64
    want[2:4] = 0b10101010, 0b11001100
    want[65] = 0b11110000
    want[96:160] = np.array([1, 2, *[0] * 30], np.float16).view(np.uint8)
    np.testing.assert_array_equal(packed, want)


def test_packed_bytes_of_ternary_codes() -> None:
    """Two groups of a row by hand: 24 weights, then 20."""
    trits = np.zeros((2, 44), np.int64)
    trits[1, :3] = [1, 0, 0]  # 1
    trits[1, 3:6] = [0, -1, 0]  # -3
    trits[1, 6:9] = [1, 1, 1]  # 13
    trits[1, 9:12] = [-1, -1, -1]  # -13
    trits[1, 12:15] = [-1, 1, 0]  # 2
    trits[1, 21:24] = [1, -1, -1]  # -11
    trits[1, 24:27] = [0, 0, 1]  # 9
    trits[1, 42:44] = [1, -1]  # -2, with a weight of padding
    scales = np.array([[1, 2], [3, 4]], np.float16)
    packed = _core.pack(
        (trits + 1).astype(np.uint8),
        scales,
        bits=2,
        group_size=24,
        offset_kind="none",
        encoding="ternary",
    )
    want = np.zeros(448, np.uint8)  # 5 * 32 + 64 and 5 * 32 + 64
    want[1] = 0b10001010
    want[33], want[65], want[97], want[129] = 0x31, 0xDD, 0x02, 0xB0
    want[160:164] = scales[:, 0].copy().view(np.uint8)
    want[225] = 0b01000000
    want[257], want[353] = 0x09, 0x02
    want[384:388] = scales[:, 1].copy().view(np.uint8)
    np.testing.assert_array_equal(packed, want)


@pytest.mark.parametrize(
    ("k", "size"), [(1, 192), (12, 192), (13, 192), (18, 192), (24, 256), (36, 320), (4096, 27392)]
)
def test_last_ternary_chunk_is_no_longer_than_needed(k: int, size: int) -> None:
    kind: dict[str, Any] = {"bits": 2, "offset_kind": "none", "encoding": "ternary"}
    assert _core.packed_nbytes(1, k, group_size=k, **kind) == size


@pytest.mark.parametrize(
    ("m", "k"), [(2560, 2560), (6912, 2560), (2560, 6912), (640, 2560), (4096, 4096)]
)
def test_ternary_matrices_of_one_scale_take_167_hundredths_of_a_bit(m: int, k: int) -> None:
    kind: dict[str, Any] = {"bits": 2, "offset_kind": "none", "encoding": "ternary"}
    assert 8 * _core.packed_nbytes(m, k, group_size=k, scale=1.0, **kind) <= 1.67 * m * k


def test_packed_bytes_of_binary_codes() -> None:
    """One chunk of a 3-bit matrix by hand: every plane of all rows, then the scales of each."""
    codes = np.zeros((2, 8), np.uint8)
    codes[1] = [0, 1, 2, 3, 4, 5, 6, 7]
    packed = _core.pack(
        codes,
        np.array([[[1, 2, 3]], [[4, 5, 6]]], np.float16),
        np.array([[7], [8]], np.float16),
        bits=3,
        group_size=8,
        offset_kind="offset",
        encoding="bcq",
    )
    want = np.zeros(384, np.uint8)  # 3 * 32 and 4 * 64, rounded up to 64
    want[1], want[33], want[65] = 0b10101010, 0b11001100, 0b11110000
    for i, constants in enumerate(([1, 4], [2, 5], [3, 6], [7, 8])):
        want[96 + 64 * i :][:4] = np.array(constants, np.float16).view(np.uint8)
    np.testing.assert_array_equal(packed, want)


GOOD: dict[str, Any] = {"bits": 4, "group_size": 16, "offset_kind": "offset"}

TERNARY_SPEC: dict[str, Any] = {
    "bits": 2,
    "offsets": None,
    "offset_kind": "none",
    "encoding": "ternary",
}


BCQ_SPEC: dict[str, Any] = {"encoding": "bcq", "scales": np.ones((4, 2, 4), np.float16)}


def pack_with(**changes: Any) -> NDArray[np.uint8]:
    arguments: dict[str, Any] = {
        "codes": np.zeros((4, 32), np.uint8),
        "scales": np.ones((4, 2), np.float16),
        "offsets": np.zeros((4, 2), np.float16),
        **GOOD,
        **changes,
    }
    return _core.pack(
        arguments.pop("codes"), arguments.pop("scales"), arguments.pop("offsets"), **arguments
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"codes": np.zeros((4, 32), np.int8)}, "codes must be of dtype uint8"),
        ({"codes": np.zeros(128, np.uint8)}, r"codes must be a matrix \[m, k\]"),
        ({"codes": np.zeros((32, 4), np.uint8).T}, "codes must be C-contiguous"),
        ({"codes": np.zeros((4, 64), np.uint8)[:, ::2]}, "codes must be C-contiguous"),
        ({"codes": np.full((4, 32), 16, np.uint8)}, "codes must be below 2"),
        ({"codes": np.zeros((0, 32), np.uint8)}, "m must be"),
        ({"codes": np.zeros((4, 0), np.uint8)}, "k must be"),
        ({"scales": np.ones((4, 2), np.float32)}, "scales must be of dtype float16"),
        ({"scales": np.ones((4, 2), ">f2")}, "scales must be of dtype float16"),
        ({"scales": np.ones((4, 3), np.float16)}, r"scales must be \[4, 2\], not \[4, 3\]"),
        ({"scales": np.ones((2, 4), np.float16)}, r"scales must be \[4, 2\], not \[2, 4\]"),
        ({"scales": np.ones((2, 4), np.float16).T}, "scales must be C-contiguous"),
        ({"offsets": np.ones((4, 2), np.float64)}, "offsets must be of dtype float16"),
        ({"offsets": np.ones((4, 1), np.float16)}, r"offsets must be \[4, 2\], not \[4, 1\]"),
        ({"offsets": np.ones((2, 4), np.float16)}, r"offsets must be \[4, 2\], not \[2, 4\]"),
        ({"offsets": None}, "offset_kind 'offset'"),
        ({"offset_kind": "none"}, "offset_kind 'none'"),
        ({"offset_kind": "min"}, "offset_kind must be"),
        ({"group_size": 6}, "group_size must be a multiple of 4"),
        ({"group_size": 0}, "group_size must be a multiple of 4"),
        ({"group_size": -4}, "group_size must be a multiple of 4"),
        ({"bits": 0}, "bits must be 1 to 8"),
        ({"bits": 9}, "bits must be 1 to 8"),
        ({"encoding": "binary"}, "encoding must be 'uniform', 'ternary' or 'bcq', not"),
        ({**TERNARY_SPEC, "bits": 4}, "ternary codes have 2 bits, not 4"),
        ({**TERNARY_SPEC, "offset_kind": "offset"}, "ternary weights have no offsets"),
        ({**TERNARY_SPEC, "codes": np.full((4, 32), 3, np.uint8)}, "codes must be 0, 1 or 2"),
        ({**TERNARY_SPEC, "scale": 1.0, "group_size": 32}, "goes with no scales"),
        ({**TERNARY_SPEC, "scale": 1.0, "scales": None}, "its group_size k"),
        ({"scale": 1.0, "scales": None}, "the matrix ternary"),
        ({**BCQ_SPEC, "bits": 5}, "binary-coded weights have 1 to 4 bits, not 5"),
        ({**BCQ_SPEC, "bits": 3}, r"scales must be \[4, 2, 3\], not \[4, 2, 4\]"),
        ({**BCQ_SPEC, "scales": np.ones((4, 2), np.float16)}, r"scales must be \[4, 2, 4\]"),
        ({**BCQ_SPEC, "offset_kind": "zero"}, "binary-coded weights have offsets"),
        ({**BCQ_SPEC, "offset_kind": "none", "offsets": None}, "weights have offsets"),
        ({**BCQ_SPEC, "scale": 1.0, "scales": None}, "the matrix ternary"),
        ({"scales": None}, "no scale goes with an array of scales"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_pack_names_the_wrong_argument(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        pack_with(**changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"m": 33}, "packed must be"),
        ({"k": 1024}, "packed must be"),
        ({"k": 0}, "k must be"),
        ({"m": -1}, "m must be"),
        ({"bits": 9}, "bits must be 1 to 8"),
        ({"group_size": 6}, "group_size must be a multiple of 4"),
        ({"packed": np.zeros(4, np.int8)}, "packed must be of dtype uint8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.parametrize("function", ["unpack", "Linear"])
def test_packed_bytes_must_fit_the_shape(function: str, changes: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"packed": pack_with(), "m": 4, "k": 32, **GOOD, **changes}
    if function == "Linear":
        arguments["zero"] = 0.0
    with pytest.raises(ValueError, match=text):
        getattr(_core, function)(arguments.pop("packed"), **arguments)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (np.zeros((1, 31), np.float32), r"x must be \[n, 32\]"),
        (np.zeros(32, np.float32), r"x must be \[n, 32\]"),
        (np.zeros((0, 32), np.float32), r"x must be \[n, 32\]"),
        (np.zeros((1, 32), np.float64), "x must be of dtype float32"),
        (np.zeros((32, 2), np.float32).T, "x must be C-contiguous"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.dtype}{value.shape}",
)
def test_forward_names_the_wrong_input(x: NDArray[Any], text: str, pool: _core.ThreadPool) -> None:
    w = _core.Linear(pack_with(), m=4, k=32, zero=0.0, **GOOD)
    with pytest.raises(ValueError, match=text):
        _core.linear_forward(w, x, pool, tables="int8")


def test_the_zero_of_ternary_weights_is_1() -> None:
    kind: dict[str, Any] = {"bits": 2, "offset_kind": "none", "encoding": "ternary"}
    with pytest.raises(ValueError, match="their zero is 1"):
        _core.Linear(np.zeros(256, np.uint8), m=1, k=24, group_size=24, zero=0.0, **kind)


def test_the_zero_of_binary_coded_weights_is_0() -> None:
    kind: dict[str, Any] = {"bits": 2, "offset_kind": "offset", "encoding": "bcq"}
    with pytest.raises(ValueError, match="their zero is 0"):
        _core.Linear(np.zeros(384, np.uint8), m=1, k=24, group_size=24, zero=1.0, **kind)


def test_unknown_names_are_refused(pool: _core.ThreadPool) -> None:
    w = _core.Linear(pack_with(), m=4, k=32, zero=0.0, **GOOD)
    with pytest.raises(ValueError, match="tables must be 'int8', 'exact' or 'exact8', not 'int4'"):
        _core.linear_forward(w, np.zeros((1, 32), np.float32), pool, tables="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'mmx' is not an instruction set .* choose from scalar"):
        _core.use_isa("mmx")
    for threads in (0, -1, 1025):
        with pytest.raises(ValueError, match="threads must be 1 to 1024"):
            _core.ThreadPool(threads)


@pytest.mark.parametrize("k", [130_000, 140_001])
def test_long_rows_of_ternary_weights_have_the_same_bits_everywhere(
    k: int, pool: _core.ThreadPool
) -> None:
    """A group's sum of integers can pass 2^24, where floats round: in one order."""
    rng = np.random.default_rng(k)
    x = rng.uniform(0.97, 1, (3, k)).astype(np.float32)
    codes = rng.choice(np.array([1, 2], np.uint8), (2, k), p=[0.005, 0.995])
    weights = linear(ternary_tensor(codes, 1.0))
    before = _core.active_isa()
    try:
        products = []
        for name in ISAS:
            _core.use_isa(name)
            products.append(_core.linear_forward(weights, x, pool, tables="exact8"))
    finally:
        _core.use_isa(before)
    for product in products[1:]:
        np.testing.assert_array_equal(product, products[0])
