"""``head_bits`` for embedding and lm_head that a checkpoint stores as codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tiny_checkpoints import TINY, gguf_tensors, random_weights, write_gguf
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.checkpoint import HEADS
from tmac_py.converters.stored_heads import DequantisedMatrix
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.lutfile import LutFile
from tmac_py.packing import unpack_rows
from tmac_py.quant import QuantTensor, bcq_tensor, quantize_rtn, quantize_ternary


def stored(path: Path, kind: str) -> Path:
    return write_gguf(path, TINY, gguf_tensors(random_weights(TINY), TINY, kind))


def matrix(path: Path, name: str) -> QuantTensor:
    with LutFile.open(path) as file:
        packed, spec = file.linear(name)
        return unpack_rows(packed, spec, slice(0, spec.m))


def test_stored_codes_are_kept_unless_bits_are_given(tmp_path: Path) -> None:
    source = stored(tmp_path / "m.gguf", "Q8_0")
    convert(source, tmp_path / "kept.lut")
    convert(source, tmp_path / "six.lut", head_bits=6)
    for tensor in open_checkpoint(source).tensors:
        if not tensor.is_matrix:
            continue
        codes = tensor.load()
        assert isinstance(codes, QuantTensor)
        kept, new = (matrix(tmp_path / f"{out}.lut", tensor.name) for out in ("kept", "six"))
        assert np.array_equal(kept.codes, codes.codes)
        if tensor.name not in HEADS:
            assert np.array_equal(new.codes, codes.codes)
            continue
        want = quantize_rtn(codes.dequantize(), bits=6, group_size=32, asym=True, search="mse")
        assert (new.bits, new.group_size, new.offset_kind) == (6, 32, "offset")
        assert np.array_equal(new.dequantize(), want.dequantize())
    with LutFile.open(tmp_path / "six.lut") as file:
        assert file.source["quantised"] == "mse head_bits=6 group_size=32"
    convert(source, tmp_path / "six.lut", head_bits=6, verify=True)
    with pytest.raises(ModelFileError, match=r"lm_head\.weight"):
        convert(source, tmp_path / "kept.lut", head_bits=6, verify=True)


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q5_K", 6), ("Q4_0", 4)])
def test_bits_that_gain_nothing_are_refused(tmp_path: Path, kind: str, bits: int) -> None:
    source = stored(tmp_path / "m.gguf", kind)
    with pytest.raises(UnsupportedError, match="head_bits would have no effect"):
        convert(source, tmp_path / "m.lut", head_bits=bits)
    with pytest.raises(UnsupportedError, match="bits would have no effect"):
        convert(source, tmp_path / "m.lut", bits=3, head_bits=bits - 1)


def test_rows_of_every_encoding() -> None:
    rng = np.random.default_rng(0)
    w = rng.normal(size=(40, 48)).astype(np.float32)
    binary = bcq_tensor(
        rng.integers(0, 4, (40, 48), dtype=np.uint8),
        rng.normal(size=(40, 3, 2)).astype(np.float16),
        rng.normal(size=(40, 3)).astype(np.float16),
        group_size=16,
        order=rng.permutation(48).astype(np.int32),
    )
    for q in (
        quantize_rtn(w, bits=8, group_size=16),
        quantize_rtn(w, bits=5, group_size=-1, asym=True),
        quantize_ternary(w),
        binary,
    ):
        lazy = DequantisedMatrix(q)
        assert lazy.shape == q.dequantize().shape
        for rows in (slice(0, 40), slice(3, 7), slice(32, 40)):
            assert np.array_equal(lazy[rows], q.dequantize()[rows])
