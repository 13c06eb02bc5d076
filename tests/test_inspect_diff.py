"""``tmac inspect --diff``: what it finds, and by how much weights differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny_checkpoints import TINY, hf_config, random_weights, write_hf
from tmac_py.cli import main as program
from tmac_py.converters import convert
from tmac_py.packing import pack, unpack_rows
from tmac_py.quant import QuantTensor, bcq_tensor, quantize_rtn, ternary_tensor

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.lut and equal.lut; b.lut of other bits; moved.lut with one matrix 3 % larger."""
    folder = tmp_path_factory.mktemp("diff")
    weights = random_weights(TINY)
    source = write_hf(folder / "a", weights, hf_config(TINY))
    for name in ("a", "equal"):
        convert(source, folder / f"{name}.lut", head_bits=8, bits=8)
    convert(source, folder / "b.lut", head_bits=8, bits=4)
    weights[UP] = weights[UP] * np.float32(1.03)
    moved = write_hf(folder / "moved", weights, hf_config(TINY, rope_theta=5e5))
    convert(moved, folder / "moved.lut", head_bits=8, bits=8)
    return folder


def diff(files: Path, capsys: pytest.CaptureFixture[str], *names: str) -> tuple[int, Any]:
    status = program.inspect(
        [str(files / names[1]), "--diff", str(files / names[0]), "--json", *names[2:]]
    )
    return status, json.loads(capsys.readouterr().out)


def test_equal_files(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diff(files, capsys, "a.lut", "equal.lut") == (0, {})
    assert program.inspect([str(files / "a.lut"), "--diff", str(files / "equal.lut")]) == 0
    assert capsys.readouterr().out == "no differences\n"


def test_one_matrix_and_the_configuration(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = diff(files, capsys, "a.lut", "moved.lut")
    assert status == 1
    assert found["config"] == {"rope_theta": [TINY.rope_theta, 5e5]}
    assert found["source"] == {"file": ["a", "moved"]}
    (tensor,) = found["tensors"]
    assert tensor["name"] == UP
    assert tensor["relative_error"] == pytest.approx(0.03, rel=0.05)


def test_other_bits(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = diff(files, capsys, "a.lut", "b.lut")
    assert status == 1
    assert len(found["tensors"]) == 7 * TINY.num_hidden_layers
    assert all("8 bits" in t["first"] and "4 bits" in t["second"] for t in found["tensors"])
    assert all(0.01 < t["relative_error"] < 0.2 for t in found["tensors"])
    assert program.inspect([str(files / "b.lut"), "--diff", str(files / "a.lut")]) == 1
    assert "relative error" in capsys.readouterr().out


def test_a_missing_file_is_one_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.inspect([str(files / "a.lut"), "--diff", str(files / "none.lut")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def quantised(kind: str) -> QuantTensor:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(100, 256)).astype(np.float32)
    trits = rng.integers(0, 3, w.shape, np.uint8)
    if kind == "ternary":
        return ternary_tensor(trits, 0.5)
    if kind == "bcq":
        scales = rng.random((100, 4, 2)).astype(np.float16)
        offsets = rng.random((100, 4)).astype(np.float16)
        return bcq_tensor(trits, scales, offsets, group_size=64)
    return quantize_rtn(w, bits=3, group_size=64, asym=kind == "asym")


@pytest.mark.parametrize("kind", ["sym", "asym", "ternary", "bcq"])
@pytest.mark.parametrize("rows", [(0, 100), (0, 1), (31, 65), (64, 100), (99, 100)])
def test_rows_come_back(kind: str, rows: tuple[int, int]) -> None:
    q = quantised(kind)
    got = unpack_rows(pack(q), q.spec, slice(*rows))
    np.testing.assert_array_equal(got.dequantize(), q.dequantize()[slice(*rows)])
