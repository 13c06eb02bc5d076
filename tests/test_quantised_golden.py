"""Modules as the tools of the quantised formats store them (golden/make_quantised.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_checkpoints import open_module
from tmac_py.quant import QuantTensor

GOLDEN = sorted((Path(__file__).parent / "golden").glob("quantised-*.npz"))
F16_STEP = 2.0**-11


def cases(path: Path) -> dict[str, dict[str, NDArray[Any]]]:
    """Contents of a golden file by case."""
    result: dict[str, dict[str, NDArray[Any]]] = {}
    with np.load(path) as arrays:
        for name, values in arrays.items():
            case, _, part = name.partition("/")
            result.setdefault(case, {})[part] = values
    return result


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_weights_are_those_of_the_tool(path: Path, tmp_path: Path) -> None:
    """Exactly, but for HQQ's scales and zero points where they are float32: fp16 rounds both."""
    for name, case in cases(path).items():
        settings = json.loads(case["settings"].tobytes())
        tensors = {part[8:]: w for part, w in case.items() if part.startswith("tensors/")}
        q = open_module(tmp_path, settings, tensors, case["weight"].shape).load()
        assert isinstance(q, QuantTensor)
        want = case["weight"].astype(np.float32)
        if case["weight"].dtype == np.float16:
            assert np.array_equal(q.dequantize(), want), name
            continue
        assert q.scales is not None
        scales = np.repeat(q.scales.astype(np.float32), q.group_size, axis=1)
        zeros = np.repeat(
            np.full_like(q.scales, q.zero) if q.offsets is None else q.offsets, q.group_size, axis=1
        )
        off = np.abs(q.dequantize() - want)
        steps = np.abs(q.codes - zeros.astype(np.float32)) + np.abs(zeros.astype(np.float32))
        assert (off <= np.abs(scales) * steps * F16_STEP * 1.01).all(), name


def test_every_format_is_there() -> None:
    names = [name for path in GOLDEN for name in cases(path)]
    assert len(GOLDEN) == 5
    assert len(names) > 100
    ordered = [name for name in names if "act-order" in name]
    assert len(ordered) == 10
