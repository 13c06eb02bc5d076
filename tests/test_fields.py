"""Fields of a few bits out of words and bytes, against their definitions on whole numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tmac_py import _core, parallel
from tmac_py.parallel import map_threads


def random_words(rows: int, columns: int, seed: int = 0) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 1 << 32, (rows, columns), np.uint32)


def stream_fields(row: NDArray[Any], bits: int, count: int) -> list[int]:
    number = sum(int(word) << 32 * i for i, word in enumerate(row))
    return [number >> bits * i & (1 << bits) - 1 for i in range(count)]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 5), (33, 40)])
@pytest.mark.parametrize("transposed", [False, True])
def test_streams(bits: int, rows: int, columns: int, transposed: bool) -> None:
    words = random_words(rows, columns)
    stored = np.ascontiguousarray(words.T).T if transposed else words
    most = columns * 32 // bits
    for count in {most, max(1, most - 3)}:
        out = np.empty((rows, count), np.uint8)
        _core.unpack_streams(stored, out, bits=bits)
        expected = [stream_fields(row, bits, count) for row in words]
        np.testing.assert_array_equal(out, expected)
        order = np.random.default_rng(1).permutation(count).astype(np.int32)
        _core.unpack_streams(stored.view(np.int32), out, bits=bits, order=order)
        np.testing.assert_array_equal(out, np.array(expected)[:, order])


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (65, 18), (128, 16)])
def test_nibble_rows(rows: int, columns: int) -> None:
    words, which = random_words(rows, columns + 2)[:, 1:-1], (0, 4, 1, 5, 2, 6, 3, 7)
    out = np.empty((columns * 8, rows), np.uint8)
    _core.unpack_nibble_rows(words, out, which)
    for c in range(columns):
        for i, field in enumerate(which):
            np.testing.assert_array_equal(out[8 * c + i], words[:, c] >> 4 * field & 15)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("run", [4, 12, 16, 32])
def test_runs(bits: int, run: int) -> None:
    blocks = np.random.default_rng(bits).integers(0, 256, (3, 2 * run + 5), np.uint8)
    packed = blocks[:, 3:-2]
    expected = [
        [int(byte) >> shift & (1 << bits) - 1 for shift in range(0, 8, bits) for byte in part]
        for row in packed
        for part in (row[:run], row[run:])
    ]
    np.testing.assert_array_equal(
        _core.unpack_runs(packed, run, bits), np.reshape(expected, (3, -1))
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, o: _core.unpack_streams(w, o, bits=9), "bits must be 1 to 8, not 9"),
        (lambda w, o: _core.unpack_streams(w, o, bits=5), "fewer than 8 fields of 5 bits"),
        (lambda w, o: _core.unpack_streams(w, o[:1], bits=4), r"out must be \[2, 8\]"),
        (
            lambda w, o: _core.unpack_streams(w, o, bits=4, order=np.arange(1, 9, dtype=np.int32)),
            "order must hold 0 to 7; entry 7 is 8",
        ),
        (lambda w, o: _core.unpack_streams(w.view(np.uint8), o, bits=4), "32-bit integers"),
        (lambda w, o: _core.unpack_nibble_rows(w, o, [0] * 7), "8 fields, not 7"),
        (lambda w, o: _core.unpack_nibble_rows(w, o, [8] * 8), "0 to 7, not 8"),
        (lambda w, o: _core.unpack_nibble_rows(w, o, [0] * 8), r"out must be \[8, 2\]"),
        (lambda _, o: _core.unpack_runs(o, 3, 4), "runs of 3"),
        (lambda _, o: _core.unpack_runs(o, 4, 3), "bits must be 1, 2 or 4, not 3"),
        (lambda _, o: _core.unpack_runs(o[:, ::2], 4, 4), "rows are contiguous"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(random_words(2, 1), np.zeros((2, 8), np.uint8))


@pytest.mark.parametrize("threads", [1, 3])
def test_map_threads_raises_the_first_error(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(parallel, "default_threads", lambda: threads)
    assert map_threads(lambda i: i * i, range(50)) == [i * i for i in range(50)]

    def fail(i: int) -> None:
        if i % 10 == 7:
            raise ValueError(f"item {i}")

    with pytest.raises(ValueError, match=r"item 7$"):
        map_threads(fail, range(50))
