"""qkv_proj and gate_up_proj: the same .lut as of the projections on their own, in every format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import quantised_writers as write
from checkpoint_families import SMALL
from quantised_writers import Matrix, Tensors, random_matrix
from tiny_checkpoints import hf_config, random_weights, write_hf
from tmac_py.converters import convert, open_checkpoint
from tmac_py.errors import ModelFileError
from tmac_py.lutfile import LutFile

LAYER = "model.layers.0."
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Matrix], Tensors], int]] = {
    "gptq": (write.gptq_settings(3, 32), lambda w: write.gptq(w), 3),
    "act-order": (write.gptq_settings(4, 32, desc_act=True), lambda w: write.gptq(w), 4),
    "awq": (write.awq_settings(32, "gemm"), write.awq_gemm, 4),
    "gemv": (write.awq_settings(32, "gemv"), write.awq_gemv, 4),
    "packed": (write.packed_settings(4, 32, symmetric=False), write.pack_quantized, 4),
    "hqq": ({"quant_method": "hqq"}, lambda w: write.hqq(w, w.zeros.astype(np.float16)), 4),
}


def stacked(parts: list[Matrix]) -> Matrix:
    """Their rows as those of one matrix; act-order has one order for it."""
    return replace(
        parts[0],
        codes=np.concatenate([w.codes for w in parts]),
        scales=np.concatenate([w.scales for w in parts]),
        zeros=np.concatenate([w.zeros for w in parts]),
    )


def folders(path: Path, name: str) -> tuple[Path, Path]:
    """The same model with projections on their own, and fused."""
    settings, writer, bits = FORMATS[name]
    rng = np.random.default_rng(0)
    plain: dict[str, NDArray[Any]] = dict(random_weights(SMALL))
    matrices: dict[str, Matrix] = {}
    for weight in [weight for weight in plain if "_proj" in weight]:
        module = weight.removesuffix(".weight")
        m, k = plain.pop(weight).shape
        w = random_matrix(rng, m, k, bits=bits, group_size=32)
        if name == "act-order":
            w = replace(w, groups=np.random.default_rng(k).permutation(w.groups))
        matrices[module] = w
    fused = dict(plain)
    inside = {LAYER + part for parts in FUSED.values() for part in parts}
    for module, w in matrices.items():
        stored = {f"{module}.{part}": tensor for part, tensor in writer(w).items()}
        plain.update(stored)
        if module not in inside:
            fused.update(stored)
    for module, parts in FUSED.items():
        whole = stacked([matrices[LAYER + part] for part in parts])
        fused.update({f"{LAYER}{module}.{part}": t for part, t in writer(whole).items()})
    config = hf_config(SMALL, quantization_config=settings)
    return (
        write_hf(path / "plain" / "m", plain, config, dtype=None),
        write_hf(path / "fused" / "m", fused, config, dtype=None),
    )


def assert_equal_files(plain: Path, fused: Path) -> None:
    for folder in (plain, fused):
        convert(folder, folder.parent / "m.lut")
    assert (plain.parent / "m.lut").read_bytes() == (fused.parent / "m.lut").read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_stored_codes_are_split_by_rows(tmp_path: Path, name: str) -> None:
    assert_equal_files(*folders(tmp_path, name))


def dense(path: Path) -> tuple[Path, Path]:
    weights = random_weights(SMALL)
    fused = dict(weights)
    for module, parts in FUSED.items():
        rows = [fused.pop(f"{LAYER}{part}.weight") for part in parts]
        fused[f"{LAYER}{module}.weight"] = np.concatenate(rows)
    return (
        write_hf(path / "plain" / "m", weights, hf_config(SMALL), dtype="BF16"),
        write_hf(path / "fused" / "m", fused, hf_config(SMALL), dtype="BF16"),
    )


def test_floats_are_split_by_rows(tmp_path: Path) -> None:
    plain, fused = dense(tmp_path)
    assert_equal_files(plain, fused)
    matrices = [{t.name: t.load() for t in open_checkpoint(p).tensors} for p in (plain, fused)]
    for name, whole in matrices[0].items():
        for rows in (slice(None), slice(3, 9), slice(5, 5), slice(30, 10**6)):
            assert np.array_equal(whole[rows], matrices[1][name][rows])  # type: ignore[index]


def test_what_is_missing_has_its_own_name(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    weights[f"{LAYER}self_attn.qkv_proj.weight"] = np.zeros((100, 64), np.float32)
    path = write_hf(tmp_path / "m", weights, hf_config(SMALL))
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    assert "qkv_proj.weight [100, 64] instead of [128, 64]" in str(caught.value)
    assert "not expected: model.layers.0.self_attn.q_proj.weight [64, 64]" in str(caught.value)


def test_the_lut_names_projections_as_ever(tmp_path: Path) -> None:
    _, fused = dense(tmp_path)
    convert(fused, tmp_path / "m.lut")
    with LutFile.open(tmp_path / "m.lut") as file:
        assert sorted(file.tensors) == sorted(SMALL.tensor_shapes())
