"""The packed layout as docs/lut-format.md gives it, against the packer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tmac_py.lutheader import check_spec, packed_nbytes
from tmac_py.spec import LinearSpec

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


def documented_pack() -> Callable[..., bytes]:
    code = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1], scope)
    return scope["pack"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_documented_layout_is_the_packers(spec: LinearSpec) -> None:
    check_spec(spec)
    rng = np.random.default_rng(spec.bits)
    codes = rng.integers(0, 1 << spec.bits, (spec.m, spec.k), dtype=np.uint8)
    n_groups = -(-spec.k // spec.group_size)
    scales = rng.standard_normal((spec.m, n_groups)).astype(np.float16)
    offsets = None if spec.offset_kind == "none" else scales[::-1].copy()
    expected = documented_pack()(codes, scales, offsets, bits=spec.bits, group_size=spec.group_size)
    assert len(expected) == packed_nbytes(spec)
    core = pytest.importorskip("tmac_py._core")
    packed = core.pack(
        codes,
        scales,
        offsets,
        bits=spec.bits,
        group_size=spec.group_size,
        offset_kind=spec.offset_kind,
    )
    assert packed.tobytes() == expected
    assert packed.nbytes == core.packed_nbytes(
        spec.m, spec.k, bits=spec.bits, group_size=spec.group_size, offset_kind=spec.offset_kind
    )


def test_worked_example_of_the_document() -> None:
    codes = np.array([[0, 1, 2, 3, 3, 2, 1, 0]], np.uint8)
    packed = documented_pack()(codes, np.array([[0.5]], np.float16), None, bits=2, group_size=8)
    listed = dict(
        re.findall(r"offset +(\d+):  ((?:[0-9a-f]{2} )+)", DOCUMENT.read_text(), flags=re.MULTILINE)
    )
    expected = bytearray(128)
    for offset, digits in listed.items():
        values = bytes.fromhex(digits)
        expected[int(offset) : int(offset) + len(values)] = values
    assert len(listed) == 2
    assert packed == bytes(expected)
