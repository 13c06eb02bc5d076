"""The packed layout as docs/lut-format.md gives it, against the packer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tmac_py import _core
from tmac_py.lutheader import check_spec, packed_nbytes
from tmac_py.packing import pack
from tmac_py.quant import QuantTensor, bcq_tensor, ternary_tensor
from tmac_py.spec import LAYOUTS, LinearSpec

DOCUMENT = Path(__file__).parent.parent / "docs" / "lut-format.md"


SPECS = [
    LinearSpec(m, k, bits, group_size, offset_kind)  # type: ignore[arg-type]
    for bits in range(1, 9)
    for m, k, group_size, offset_kind in (
        (1, 8, 8, "none"),
        (32, 64, 32, "offset"),
        (33, 60, 60, "none"),
        (31, 68, 32, "zero"),
        (96, 36, 12, "offset"),
        (5, 7, 7, "zero"),
    )
]


TERNARY_SPECS = [
    LinearSpec(m, k, 2, group_size, "none", 1.0, LAYOUTS["ternary"])
    for m, k, group_size in (
        (1, 24, 24),
        (32, 96, 96),
        (33, 100, 100),
        (31, 60, 32),
        (96, 512, 256),
        (5, 7, 4),
    )
] + [
    LinearSpec(m, k, 2, k, "none", 1.0, LAYOUTS["ternary"], 0.375)
    for m, k in ((1, 24), (33, 100), (64, 2560), (5, 7))
]


BCQ_SPECS = [
    LinearSpec(m, k, bits, group_size, "offset", 0.0, LAYOUTS["bcq"])
    for bits in range(1, 5)
    for m, k, group_size in (
        (1, 8, 8),
        (32, 64, 32),
        (33, 60, 60),
        (31, 68, 32),
        (96, 36, 12),
        (5, 7, 7),
    )
]


def documented(name: str) -> Callable[..., bytes]:
    scope: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL):
        exec(code, scope)
    return scope[name]  # type: ignore[no-any-return]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_documented_layout_is_the_packers(spec: LinearSpec) -> None:
    check_spec(spec)
    rng = np.random.default_rng(spec.bits)
    codes = rng.integers(0, 1 << spec.bits, (spec.m, spec.k), dtype=np.uint8)
    n_groups = -(-spec.k // spec.group_size)
    scales = rng.standard_normal((spec.m, n_groups)).astype(np.float16)
    offsets = None if spec.offset_kind == "none" else scales[::-1].copy()
    expected = documented("pack")(
        codes, scales, offsets, bits=spec.bits, group_size=spec.group_size
    )
    assert len(expected) == packed_nbytes(spec)
    packed = _core.pack(
        codes,
        scales,
        offsets,
        bits=spec.bits,
        group_size=spec.group_size,
        offset_kind=spec.offset_kind,
    )
    assert packed.tobytes() == expected
    assert packed.nbytes == _core.packed_nbytes(
        spec.m, spec.k, bits=spec.bits, group_size=spec.group_size, offset_kind=spec.offset_kind
    )


@pytest.mark.parametrize("spec", TERNARY_SPECS, ids=str)
def test_documented_ternary_layout_is_the_packers(spec: LinearSpec) -> None:
    check_spec(spec)
    rng = np.random.default_rng(spec.k)
    codes = rng.integers(0, 3, (spec.m, spec.k), dtype=np.uint8)
    n_groups = -(-spec.k // spec.group_size)
    scales = rng.standard_normal((spec.m, n_groups)).astype(np.float16)
    given = scales if spec.scale is None else spec.scale
    q = ternary_tensor(codes, given, group_size=spec.group_size)
    assert q.spec == spec
    stored = scales if spec.scale is None else None
    expected = documented("pack_ternary")(codes, stored, group_size=spec.group_size)
    assert len(expected) == packed_nbytes(spec)
    packed = pack(q)
    assert packed.tobytes() == expected
    kind: dict[str, Any] = {
        "group_size": spec.group_size,
        "bits": 2,
        "offset_kind": "none",
        "encoding": "ternary",
        "scale": spec.scale,
    }
    assert packed.nbytes == _core.packed_nbytes(spec.m, spec.k, **kind)
    got_codes, got_scales, offsets = _core.unpack(packed, m=spec.m, k=spec.k, **kind)
    assert offsets is None
    np.testing.assert_array_equal(got_codes, codes)
    if stored is None:
        assert got_scales is None
    else:
        np.testing.assert_array_equal(got_scales, stored)


@pytest.mark.parametrize("spec", BCQ_SPECS, ids=str)
def test_documented_bcq_layout_is_the_packers(spec: LinearSpec) -> None:
    check_spec(spec)
    rng = np.random.default_rng([spec.k, spec.bits])
    n_groups = -(-spec.k // spec.group_size)
    q = bcq_tensor(
        rng.integers(0, 1 << spec.bits, (spec.m, spec.k), dtype=np.uint8),
        rng.standard_normal((spec.m, n_groups, spec.bits)).astype(np.float16),
        rng.standard_normal((spec.m, n_groups)).astype(np.float16),
        group_size=spec.group_size,
    )
    assert q.spec == spec
    expected = documented("pack_bcq")(q.codes, q.scales, q.offsets, group_size=spec.group_size)
    assert len(expected) == packed_nbytes(spec)
    packed = pack(q)
    assert packed.tobytes() == expected
    kind: dict[str, Any] = {
        "group_size": spec.group_size,
        "bits": spec.bits,
        "offset_kind": "offset",
        "encoding": "bcq",
    }
    assert packed.nbytes == _core.packed_nbytes(spec.m, spec.k, **kind)
    for got, want in zip(
        _core.unpack(packed, m=spec.m, k=spec.k, **kind),
        (q.codes, q.scales, q.offsets),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_worked_example_of_the_document() -> None:
    codes = np.array([[0, 1, 2, 3, 3, 2, 1, 0]], np.uint8)
    packed = documented("pack")(codes, np.array([[0.5]], np.float16), None, bits=2, group_size=8)
    listed = dict(
        re.findall(r"offset +(\d+):  ((?:[0-9a-f]{2} )+)", DOCUMENT.read_text(), flags=re.MULTILINE)
    )
    expected = bytearray(128)
    for offset, digits in listed.items():
        values = bytes.fromhex(digits)
        expected[int(offset) : int(offset) + len(values)] = values
    assert len(listed) == 2
    assert packed == bytes(expected)


@pytest.mark.parametrize("kind", ["planes", "ternary", "ternary matrix", "bcq"])
def test_pieces_that_threads_pack_are_the_whole(kind: str) -> None:
    """Runs of tiles, of a matrix with a ragged last one, against one call of the core."""
    m, k = 1000, 2048
    rng = np.random.default_rng(5)
    scales = rng.normal(0, 1, (m, 4)).astype(np.float16)
    if kind == "planes":
        codes = rng.integers(0, 8, (m, k), np.uint8)
        q = QuantTensor(codes, scales, scales, 3, 512, "zero")
    elif kind == "bcq":
        codes = rng.integers(0, 8, (m, k), np.uint8)
        q = bcq_tensor(codes, np.stack([scales] * 3, axis=2), scales, group_size=512)
    else:
        codes = rng.integers(0, 3, (m, k), np.uint8)
        q = ternary_tensor(codes, 0.5 if "matrix" in kind else scales[:, :1].copy())
    whole = _core.pack(
        q.codes,
        q.scales,
        q.offsets,
        bits=q.bits,
        group_size=q.group_size,
        offset_kind=q.offset_kind,
        encoding=q.encoding,
        scale=q.scale,
    )
    assert np.array_equal(pack(q), whole)
