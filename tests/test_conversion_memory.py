"""Memory of a conversion: bounded by a few matrices, however many layers there are."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_checkpoints import TINY, gguf_name, random_blocks, write_gguf
from tmac_py import parallel
from tmac_py.converters import convert

SMALL = replace(
    TINY, hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=8
)
LAYER = 4 * 512 * 512 + 3 * 512 * 1024
"""Weights of a layer."""

SPARE = 1 << 20
"""Bytes by which what two threads work on at once may differ from run to run."""


def write(path: Path, layers: int, kind: str) -> Path:
    config = replace(SMALL, num_hidden_layers=layers)
    tensors: dict[str, tuple[Any, str]] = {}
    for name, shape in config.tensor_shapes().items():
        if len(shape) == 1:
            tensors[gguf_name(name)] = np.ones(shape, np.float32), "F32"
        elif kind == "BF16":
            words = np.full(shape, 0x3C00, np.uint16)
            words[:, ::3] = 0xBC80
            tensors[gguf_name(name)] = words.view(np.uint8), "BF16"
        else:
            tensors[gguf_name(name)] = random_blocks((shape[0], shape[1]), kind, seed=1), kind
    return write_gguf(path, config, tensors)


def peak(source: Path, out: Path, options: dict[str, Any]) -> int:
    """Bytes that a conversion allocates at most, of Python and NumPy."""
    tracemalloc.start()
    try:
        convert(source, out, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("kind", "bits", "options"),
    [
        ("Q8_0", 8, {}),
        ("Q4_K", 4, {}),
        ("BF16", 8, {"quant": "rtn", "bits": 8}),
        ("BF16", 4, {"quant": "mse"}),
    ],
)
def test_memory_does_not_grow_with_the_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bits: int, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(parallel, "default_threads", lambda: 2)
    few, many = (write(tmp_path / f"{n}.gguf", n, kind) for n in (2, 12))
    out = tmp_path / "model.lut"
    peak(few, out, options)  # what is allocated once: modules, tables
    first = peak(few, out, options)
    second = peak(many, out, options)
    assert out.stat().st_size > 12 * LAYER * bits // 8
    # Less than one layer more, of which chance in the threads takes some; kept ones would be ten.
    assert second < first + LAYER * bits // 8 + SPARE
