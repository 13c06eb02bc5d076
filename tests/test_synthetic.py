"""Models of known shapes with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tmac_py.errors import OptionError
from tmac_py.lutfile import LutFile
from tmac_py.model import Model
from tmac_py.synthetic import SHAPES, parse_synthetic, write_synthetic


@pytest.mark.parametrize("weights", ["ternary", "2bit", "4bit", "8bit"])
def test_a_synthetic_model_runs(tmp_path: Path, weights: str) -> None:
    path = tmp_path / "model.lut"
    write_synthetic(path, f"smollm2-135m/1:{weights}")
    with Model.load(path, threads=2) as model:
        logits = model.logits([1, 2, 3])
    assert logits.shape == (3, 49152)
    assert np.isfinite(logits).all()
    assert (logits.std(axis=1) > 0.1).all()


def test_matrices_are_stored_in_the_bits_that_were_asked_for(tmp_path: Path) -> None:
    path, again = tmp_path / "model.lut", tmp_path / "again.lut"
    write_synthetic(path, "smollm2-135m/2:2bit")
    write_synthetic(again, "smollm2-135m/2:2bit")
    assert path.read_bytes() == again.read_bytes()
    with LutFile.open(path) as file:
        assert file.config.num_hidden_layers == 2
        assert file.source == {"synthetic": "smollm2-135m/2:2bit"}
        _, body = file.linear("model.layers.1.mlp.down_proj.weight")
        _, head = file.linear("model.embed_tokens.weight")
    assert (body.bits, body.group_size, body.m, body.k) == (2, 128, 576, 1536)
    assert (head.bits, head.group_size, head.m, head.k) == (6, 64, 49152, 576)


def test_every_shape_has_all_its_layers() -> None:
    for name, config in SHAPES.items():
        assert parse_synthetic(f"{name}:ternary") == (config, "ternary")


@pytest.mark.parametrize(
    "text", ["llama-2-7b", "llama-2-7b:9bit", "gpt-2:2bit", "llama-2-7b/x:2bit", ":", ""]
)
def test_other_names_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(OptionError, match=r"allowed: SHAPE:WEIGHTS.*llama-2-7b.*ternary"):
        write_synthetic(tmp_path / "model.lut", text)
    assert list(tmp_path.iterdir()) == []
