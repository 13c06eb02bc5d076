"""Real checkpoints of GPTQModel, AutoAWQ and compressed-tensors, cut to two layers.

Their reference.npz hold logits of transformers in float32 on weights that were dequantised
elsewhere, and rows of these weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tmac_py import Model
from tmac_py.converters import convert, open_checkpoint
from tmac_py.quant import QuantTensor

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "checkpoints"
NAMES = ["gptq-3bit-g32", "gptq-4bit-g64", "gptq-8bit-g64", "awq-4bit-g64"]
NAMES += ["compressed-tensors-w4a16-g64"]
MARGIN = 0.05

EIGHT_BITS_ENERGY = 2.5e-5
"""Error of a matrix rounded to 8 bits, as a part of its energy: the largest of 32 normal weights is
about 2.2 deviations, 128 steps reach that far, and rounding errs by a step / sqrt(12)."""

EXACT_ENERGY = 1e-8
"""The same for the products of exact tables, and more (docs/kernels.md)."""


@pytest.fixture(params=NAMES)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    path = FOLDER / f"smollm2-2layer-{request.param}"
    if not path.is_dir():
        pytest.skip(f"{path.name} is not in the folder shared/checkpoints beside the repository")
    return path


def test_weights_are_those_of_the_reference(checkpoint: Path) -> None:
    reference = np.load(checkpoint / "reference.npz")
    by_name = {tensor.name: tensor for tensor in open_checkpoint(checkpoint).tensors}
    for key, name, first in (
        ("q_proj_rows0_16", "model.layers.0.self_attn.q_proj.weight", 0),
        ("down_proj_rows0_16", "model.layers.0.mlp.down_proj.weight", 0),
        ("last_gate_proj_rows100_116", "model.layers.1.mlp.gate_proj.weight", 100),
    ):
        q = by_name[name].load()
        assert isinstance(q, QuantTensor)
        assert np.array_equal(q.dequantize()[first : first + 16], reference[key])
        assert q.offset_kind == ("zero" if "awq" in checkpoint.name else "none")


def test_logits_are_those_of_the_reference(checkpoint: Path, tmp_path: Path) -> None:
    """The embedding, which is stored in floats, is rounded to 8 bits. It is seen twice: in what
    goes into the layers, of which the stream still mostly consists after two of them, and as
    lm_head. Besides, exact tables round in each of 4 products in a row of a layer and in lm_head.
    """
    for out in ("a.lut", "b.lut"):
        convert(checkpoint, tmp_path / out, head_bits=8, group_size=32)
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()
    with np.load(checkpoint / "reference.npz") as reference:
        ids, theirs = reference["ids"], reference["logits"]
    with Model.load(tmp_path / "a.lut", threads=2, tables="exact") as model:
        ours = model.logits(ids)
    allowed = 2 * EIGHT_BITS_ENERGY + 9 * EXACT_ENERGY
    assert np.square(ours - theirs).sum() < allowed * np.square(theirs - theirs.mean()).sum()
    # Errors are about normal: 8 deviations are beyond what any of 400,000 reaches, and some tokens
    # are harder than others.
    assert np.abs(ours - theirs).max() < 8 * float(np.sqrt(allowed) * theirs.std())
    best = np.sort(theirs, axis=1)
    clear = best[:, -1] - best[:, -2] > MARGIN
    assert clear.mean() > 0.9
    assert np.array_equal(ours.argmax(axis=1)[clear], theirs.argmax(axis=1)[clear])
