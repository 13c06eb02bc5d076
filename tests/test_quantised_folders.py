"""Folders of quantised checkpoints: conversion, where settings stand, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import quantised_writers as write
from quantised_writers import (
    Matrix,
    Tensors,
    awq_settings,
    gptq_settings,
    packed_settings,
    random_matrix,
)
from test_hf_reader import alterations
from tiny_checkpoints import TINY, hf_config, random_weights, write_hf
from tmac_py import Model, _core
from tmac_py.cli.main import main
from tmac_py.config import ModelConfig
from tmac_py.converters import convert, open_checkpoint
from tmac_py.errors import ModelFileError, TmacError, UnsupportedError
from tmac_py.lutfile import LutFile
from tmac_py.quant import QuantTensor

WEIGHTS = random_weights(TINY)
LINEARS = [name[:-7] for name in WEIGHTS if "_proj" in name]
UP = "model.layers.0.mlp.up_proj"


def folder(
    path: Path,
    settings: dict[str, Any],
    writer: Callable[[Matrix], Tensors],
    matrix: Callable[[str, tuple[int, int]], Matrix],
    *,
    modules: list[str] = LINEARS,
    config: ModelConfig = TINY,
) -> tuple[Path, dict[str, NDArray[np.float32]]]:
    """A checkpoint whose ``modules`` are quantised, and the weights of these."""
    tensors: dict[str, NDArray[Any]] = dict(random_weights(config))
    weights = {}
    for module in modules:
        m, k = tensors.pop(f"{module}.weight").shape
        w = matrix(module, (m, k))
        tensors.update({f"{module}.{part}": values for part, values in writer(w).items()})
        scales = w.scales.astype(np.float16).astype(np.float32)
        weights[f"{module}.weight"] = scales[:, w.groups] * (w.codes - w.zeros[:, w.groups])
    path = write_hf(path, tensors, hf_config(config, quantization_config=settings), dtype=None)
    return path, {name: w.astype(np.float32) for name, w in weights.items()}


def matrices(
    bits: int, group_size: int, *, act_order: bool = False
) -> Callable[[str, tuple[int, int]], Matrix]:
    def matrix(module: str, shape: tuple[int, int]) -> Matrix:
        rng = np.random.default_rng([ord(c) for c in module])
        return random_matrix(rng, *shape, bits=bits, group_size=group_size, act_order=act_order)

    return matrix


def unpacked(file: LutFile, name: str) -> QuantTensor:
    packed, spec = file.linear(name)
    codes, scales, offsets = _core.unpack(
        packed,
        m=spec.m,
        k=spec.k,
        bits=spec.bits,
        group_size=spec.group_size,
        offset_kind=spec.offset_kind,
    )
    order = file.order(name)
    return QuantTensor(
        codes,
        scales,
        offsets,
        spec.bits,
        spec.group_size,
        spec.offset_kind,
        spec.zero,
        order=order,
    )


FORMATS: dict[str, tuple[dict[str, Any], Callable[[Matrix], Tensors], int, int, bool]] = {
    "gptq": (gptq_settings(3, 64), write.gptq, 3, 64, False),
    "act-order": (gptq_settings(4, 64, desc_act=True), write.gptq, 4, 64, True),
    "awq": (awq_settings(64, "gemm"), write.awq_gemm, 4, 64, False),
    "gemv": (awq_settings(64, "gemv"), write.awq_gemv, 4, 64, False),
    "packed": (
        packed_settings(4, -1, symmetric=False),
        write.pack_quantized,
        4,
        -1,
        False,
    ),
    "hqq": (
        {"quant_method": "hqq"},
        lambda w: write.hqq(w, w.zeros.astype(np.float16)),
        2,
        64,
        False,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_folders_become_luts(tmp_path: Path, name: str) -> None:
    settings, writer, bits, group_size, act_order = FORMATS[name]
    matrix = matrices(bits, group_size, act_order=act_order)
    path, weights = folder(tmp_path / "m", settings, writer, matrix)
    for out in ("a.lut", "b.lut"):
        convert(path, tmp_path / out, head_bits=6)
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()
    with LutFile.open(tmp_path / "a.lut") as file:
        assert file.metadata["tmac.format"] == ("2" if act_order else "1")
        assert file.source["quant_method"] == settings["quant_method"]
        for weight, want in weights.items():
            assert np.array_equal(unpacked(file, weight).dequantize(), want)
        assert file.linear("lm_head.weight")[1].bits == 6
    with Model.load(tmp_path / "a.lut", threads=2) as model:
        assert np.isfinite(model.logits(np.arange(20))).all()
    with pytest.raises(UnsupportedError, match="bits would have no effect"):
        convert(path, tmp_path / "c.lut", bits=4)


def test_methods_that_need_inputs_are_refused_where_only_the_vocabulary_is_left(
    tmp_path: Path,
) -> None:
    settings, writer, bits, group_size, act_order = FORMATS[next(iter(FORMATS))]
    matrix = matrices(bits, group_size, act_order=act_order)
    path, _ = folder(tmp_path / "m", settings, writer, matrix)
    for quant in ("gptq", "awq"):
        with pytest.raises(UnsupportedError, match=f"{quant} would have no effect: only embed"):
            convert(path, tmp_path / "m.lut", quant=quant)
    with pytest.raises(UnsupportedError, match="act_order would have no effect"):
        convert(path, tmp_path / "m.lut", quant="bcq", act_order=True)
    convert(path, tmp_path / "m.lut", quant="bcq", head_bits=3)
    with LutFile.open(tmp_path / "m.lut") as file:
        assert file.linear("lm_head.weight")[1].encoding == "bcq"


def test_a_quantised_head_and_modules_that_are_not(tmp_path: Path) -> None:
    modules = [*(name for name in LINEARS if "k_proj" not in name), "lm_head"]
    wide = replace(TINY, vocab_size=64)
    path, weights = folder(
        tmp_path / "m",
        gptq_settings(4, 32, lm_head=True),
        write.gptq,
        matrices(4, 32),
        modules=modules,
        config=wide,
    )
    dense = {tensor.name for tensor in open_checkpoint(path).tensors if tensor.dense}
    k_projs = {f"model.layers.{i}.self_attn.k_proj.weight" for i in range(2)}
    assert dense == {"model.embed_tokens.weight", *k_projs}
    convert(path, tmp_path / "m.lut", bits=8)
    with LutFile.open(tmp_path / "m.lut") as file:
        head = unpacked(file, "lm_head.weight").dequantize()
        assert np.array_equal(head, weights["lm_head.weight"])


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_beside_the_configuration(tmp_path: Path, name: str) -> None:
    key = "gptq" if name == "quantize_config.json" else "awq"
    settings, writer, bits, group_size, _ = FORMATS[key]
    path, weights = folder(tmp_path / "m", {}, writer, matrices(bits, group_size))
    bare = {k: v for k, v in settings.items() if k != "quant_method"}
    (path / name).write_text(json.dumps(bare))
    convert(path, tmp_path / "m.lut")
    with LutFile.open(tmp_path / "m.lut") as file:
        weight = f"{UP}.weight"
        assert np.array_equal(unpacked(file, weight).dequantize(), weights[weight])


AUTO_ROUND = {
    "quant_method": "auto-round",
    "packing_format": "auto_round:auto_gptq",
    "bits": 3,
    "group_size": 64,
    "extra_config": {"lm_head": {"bits": 16}, "up_proj": {"group_size": 64}},
}
HQQ = {
    "quant_method": "hqq",
    "quant_config": {"weight_quant_params": {"nbits": 2, "group_size": 64, "axis": 1}},
}


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (gptq_settings(3, 64, dynamic={"-:lm_head": {}, "x": {"bits": 4}}, format="gptq"), "gptq"),
        (awq_settings(64, "gemm"), "awq"),
        (packed_settings(4, -1, symmetric=False, ignore=["lm_head"]), "packed"),
        (AUTO_ROUND, "gptq"),
        (HQQ, "hqq"),
    ],
    ids=["gptq", "awq", "packed", "auto-round", "hqq"],
)
def test_settings_of_any_other_form_are_read_or_refused(
    tmp_path: Path, settings: dict[str, Any], name: str
) -> None:
    _, writer, bits, group_size, _ = FORMATS[name]
    if name == "hqq":
        writer = lambda w: write.hqq(w, w.zeros.astype(np.float16), settings=False)  # noqa: E731
    path, _ = folder(tmp_path / "m", settings, writer, matrices(bits, group_size))
    open_checkpoint(path)
    refused = []
    for wrong in alterations(settings):
        changed = hf_config(TINY, quantization_config=wrong)
        (path / "config.json").write_text(json.dumps(changed))
        try:
            open_checkpoint(path)
        except TmacError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(text.startswith(str(path)) and "\n" not in text for text in refused)


SETTINGS = "quantisation settings: "


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (gptq_settings(5, 32), r"GPTQ with 5 bits is not supported \(2, 3, 4, 8\)"),
        (gptq_settings(4, 32, checkpoint_format="gptq_p"), "GPTQ format 'gptq_p' is not supported"),
        (gptq_settings(4, 32, is_marlin_format=True), "GPTQ format 'marlin' is not supported"),
        (gptq_settings(4, 6), "group_size 6 is not supported"),
        (gptq_settings(4, 32, pack_dtype="int16"), "pack_dtype 'int16'"),
        (gptq_settings(4, 32, dynamic=[1]), SETTINGS + "dynamic must be an object"),
        (gptq_settings(4, 32, dynamic={"(": {}}), SETTINGS + "pattern '\\('"),
        (gptq_settings(4, 32, dynamic={".*": 3}), SETTINGS + "an object is needed for each"),
        (gptq_settings("4", 32), SETTINGS + "bits must be an integer, found '4'"),
        ({"quant_method": "gptq"}, SETTINGS + "bits must be an integer, found None"),
        (awq_settings(32, "marlin"), "AWQ version 'marlin' is not supported"),
        (awq_settings(32, "gemm", bits=3), r"AWQ with 3 bits is not supported \(4\)"),
        ({"quant_method": "auto-round", "bits": 4, "packing_format": "x"}, "packing_format 'x'"),
        (
            {"quant_method": "auto-round", "bits": 4, "data_type": "mx_fp"},
            "AutoRound data_type 'mx_fp'",
        ),
        (
            packed_settings(4, 32, symmetric=True, format="int-quantized"),
            "compressed-tensors format 'int-quantized' is not supported",
        ),
        (
            packed_settings(4, 32, symmetric=True, kv_cache_scheme={"num_bits": 8}),
            "a kv_cache_scheme is not supported",
        ),
        (
            packed_settings(4, 32, symmetric=True, sparsity_config={"format": "sparse-24"}),
            "'sparse-24' sparsity is not supported",
        ),
        (packed_settings(4, 32, symmetric=True, config_groups=[]), SETTINGS + "config_groups"),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_quant_storage": "uint8",
            },
            "quant_method 'bitsandbytes' is not supported: its NF4 and FP4 codes are not evenly",
        ),
        ({"quant_method": "aqlm"}, r"'aqlm' is not supported \(auto-round, awq, .*hqq"),
    ],
)
def test_settings_that_are_refused(
    tmp_path: Path, settings: dict[str, Any], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = folder(tmp_path / "m", settings, write.gptq, matrices(4, 32))
    with pytest.raises(TmacError, match=text):
        open_checkpoint(path)
    assert main(["convert", "-q", str(path), str(tmp_path / "m.lut")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert list(tmp_path.iterdir()) == [path]


def change_gptq(edit: Callable[[Tensors], None]) -> Callable[[Matrix], Tensors]:
    done = []

    def writer(w: Matrix) -> Tensors:
        tensors = write.gptq(w)
        if w.shape == (512, 256) and not done:  # the first gate_proj
            done.append(edit(tensors))
        return tensors

    return writer


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: t.pop("qzeros"), r"missing: .*gate_proj\.qzeros \[8, 64\]"),
        (lambda t: t.update(extra=t["scales"]), r"not expected: .*gate_proj\.extra \[8, 512\]"),
        (
            lambda t: t.update(g_idx=t["g_idx"][:-1]),
            r"of another shape: .*gate_proj\.g_idx \[255\] instead of \[256\]",
        ),
        (
            lambda t: t.update(qweight=t["qweight"][:16]),
            r"gate_proj\.qweight \[16, 512\] instead of \[32, 512\]",
        ),
        (
            lambda t: t.update(qweight=t["qweight"].view(np.float32)),
            r"dtypes are not supported: .*gate_proj\.qweight F32 \(I32\)",
        ),
        (lambda t: t["g_idx"].__setitem__(0, 8), r"gate_proj\.weight: g_idx must lie from 0 to 7"),
        (lambda t: t["scales"].__setitem__((0, 0), np.nan), r"gate_proj\.weight: scales are not"),
    ],
)
def test_modules_that_are_broken(
    tmp_path: Path,
    edit: Callable[[Tensors], None],
    text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, _ = folder(tmp_path / "m", gptq_settings(4, 32), change_gptq(edit), matrices(4, 32))
    with pytest.raises(TmacError, match=text):
        convert(path, tmp_path / "m.lut")
    assert main(["convert", "-q", str(path), str(tmp_path / "m.lut")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model.layers.0.mlp.gate_proj" in error
    assert list(tmp_path.iterdir()) == [path]


def test_all_broken_tensors_are_reported_together(tmp_path: Path) -> None:
    def writer(w: Matrix) -> Tensors:
        tensors = write.gptq(w)
        del tensors["scales"]
        return {**tensors, "qzeros": tensors["qzeros"][:, 1:].copy()}

    path, _ = folder(tmp_path / "m", gptq_settings(4, 32), writer, matrices(4, 32))
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert text.count("and 6 more") == 2  # of 14 modules
    assert "missing: model.layers.0.self_attn.q_proj.scales [8, 256]" in text
    assert "q_proj.qzeros [8, 31] instead of [8, 32]" in text
