"""The quantised formats: what writers of their descriptions (quantised_writers.py) store is read
back exactly, in modules and in whole folders."""

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
from quantised_writers import Matrix, Tensors, random_matrix
from test_hf_reader import alterations
from tiny_checkpoints import TINY, hf_config, open_module, random_weights, write_hf
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


def gptq_settings(bits: Any, group_size: int, **changes: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **changes}


def awq_settings(group_size: int, version: str, **changes: Any) -> dict[str, Any]:
    common = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
    return {**common, "version": version, **changes}


def packed_settings(
    bits: int, group_size: int, *, symmetric: bool, **changes: Any
) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        **changes,
    }


def read(
    folder: Path, settings: dict[str, Any], tensors: Tensors, shape: tuple[int, ...]
) -> QuantTensor:
    q = open_module(folder, settings, tensors, shape).load()
    assert isinstance(q, QuantTensor)
    return q


def check(folder: Path, settings: dict[str, Any], tensors: Tensors, w: Matrix) -> QuantTensor:
    """Reads the module; its weights must be those of ``w``."""
    q = read(folder, settings, tensors, w.shape)
    assert np.array_equal(q.dequantize(), w.weight())
    constant = bool((w.zeros == w.zeros[0, 0]).all())
    assert q.offset_kind == ("none" if constant else "zero")
    assert q.zero == (w.zeros[0, 0] if constant else 0)
    return q


SIZES = [
    (32, 64, 16),
    (32, 64, 32),
    (64, 160, 64),  # a ragged last group, as in k = 576 with groups of 128
    (32, 224, 128),
    (32, 96, 1024),
    (64, 96, -1),
]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("m", "k", "group_size"), SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(
    tmp_path: Path, bits: int, m: int, k: int, group_size: int, symmetric: bool, version: int
) -> None:
    rng = np.random.default_rng([bits, k])
    settings = gptq_settings(bits, group_size)
    if version == 2:
        settings["checkpoint_format"] = "gptq_v2"
    for act_order in (False, True):
        w = random_matrix(
            rng,
            m,
            k,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            act_order=act_order,
        )
        settings["desc_act"] = act_order
        q = check(tmp_path, settings, write.gptq(w, version=version), w)
        natural = np.array_equal(w.groups, np.sort(w.groups))
        assert (q.order is None) == natural
        if natural:
            check(tmp_path, settings, write.gptq(w, version=version, g_idx=False), w)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gptq_zeros_of_0_borrow_from_their_neighbours(tmp_path: Path, bits: int) -> None:
    """Adding 1 to each field would give others."""
    w = random_matrix(np.random.default_rng(0), 32, 64, bits=bits, group_size=32)
    zeros = np.zeros((32, 2), np.int64)
    zeros[5::7] = 2**bits - 1
    w = write.with_zeros(w, zeros)
    tensors = write.gptq(w)
    fields = np.array([write.stream(z - 1 & (2**bits - 1), bits) for z in zeros.T], np.uint32)
    assert not np.array_equal(tensors["qzeros"].view(np.uint32), fields)
    check(tmp_path, gptq_settings(bits, 32), tensors, w)


def test_gptq_flags_are_not_trusted(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    w = random_matrix(rng, 32, 64, bits=4, group_size=16, act_order=True)
    q = check(tmp_path, gptq_settings(4, 16, desc_act=False, sym=True), write.gptq(w), w)
    assert q.order is not None
    natural = random_matrix(rng, 32, 64, bits=4, group_size=16)
    settings = gptq_settings(4, 16, desc_act=True, sym=True)
    assert check(tmp_path, settings, write.gptq(natural), natural).order is None
    zeros = {**write.gptq(natural), "g_idx": np.zeros(64, np.int32)}
    check(tmp_path, gptq_settings(4, 16), zeros, natural)  # never set
    with pytest.raises(ValueError, match="16 columns to each group"):
        read(tmp_path, settings, zeros, natural.shape)
    wide = {**write.gptq(w), "g_idx": w.groups.astype(np.int64)}
    check(tmp_path, gptq_settings(4, 16), wide, w)


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        (0, 4, "g_idx must lie from 0 to 3, found 0 to 4"),
        (3, -1, "g_idx must lie from 0 to 3, found -1 to 3"),
        (0, 3, "g_idx must give 16 columns to each group but the last"),
    ],
)
def test_gptq_g_idx_that_is_none(tmp_path: Path, entry: int, value: int, text: str) -> None:
    w = random_matrix(np.random.default_rng(1), 32, 64, bits=4, group_size=16)
    tensors = write.gptq(w)
    tensors["g_idx"][entry] = value
    with pytest.raises(ValueError, match=text):
        read(tmp_path, gptq_settings(4, 16), tensors, w.shape)


def test_gptq_bits_by_module(tmp_path: Path) -> None:
    dynamic: dict[str, Any] = {
        r"-:.*\.k_proj": {},
        r"+:.*\.1\.mlp\.up_proj": {"bits": 8, "group_size": 16},
        r".*up_proj": {"bits": 2},
        r".*\.0\.mlp\.up_proj": {"bits": 3},
    }
    settings = gptq_settings(4, 32, dynamic=dynamic)
    for module, bits, group_size in (
        ("model.layers.0.mlp.up_proj", 2, 32),
        ("model.layers.1.mlp.up_proj", 8, 16),
        ("model.layers.0.mlp.gate_proj", 4, 32),
        ("lm_head", 4, 32),
    ):
        w = random_matrix(np.random.default_rng(1), 32, 64, bits=bits, group_size=group_size)
        stored = open_module(tmp_path, settings, write.gptq(w), w.shape, module=module)
        q = stored.load()
        assert isinstance(q, QuantTensor)
        assert np.array_equal(q.dequantize(), w.weight())
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"):
        dense = {"weight": WEIGHTS[f"{UP}.weight"]}
        stored = open_module(tmp_path, settings, dense, dense["weight"].shape, module=module)
        assert stored.weights.dense


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.uint16])
def test_scales_are_rounded_to_fp16(tmp_path: Path, kind: Any) -> None:
    w = random_matrix(np.random.default_rng(2), 32, 64, bits=4, group_size=32)
    scales = np.random.default_rng(0).normal(0, 0.01, w.scales.shape).astype(np.float32)
    stored = scales.astype(kind) if kind != np.uint16 else (scales.view(np.uint32) >> 16)
    tensors = write.gptq(w)
    tensors["scales"] = np.ascontiguousarray(stored.astype(kind).T)
    if kind == np.uint16:
        scales = (scales.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    check(tmp_path, gptq_settings(4, 32), tensors, replace(w, scales=scales))


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.nan, "scales are not finite"), (np.inf, "not finite"), (1e5, "exceeds the largest fp16")],
)
def test_scales_that_fp16_cannot_hold(tmp_path: Path, value: float, text: str) -> None:
    w = random_matrix(np.random.default_rng(2), 32, 64, bits=4, group_size=32)
    tensors = write.gptq(w)
    tensors["scales"] = tensors["scales"].astype(np.float32)
    tensors["scales"][1, 3] = value
    with pytest.raises(ValueError, match=text):
        read(tmp_path, gptq_settings(4, 32), tensors, w.shape)


def test_biases(tmp_path: Path) -> None:
    """Old AutoGPTQ writes one of zeros for every module."""
    w = random_matrix(np.random.default_rng(2), 32, 64, bits=4, group_size=32)
    bias = np.zeros(32, np.float16)
    check(tmp_path, gptq_settings(4, 32), {**write.gptq(w), "bias": bias}, w)
    bias[7] = 1
    with pytest.raises(ValueError, match="it has a bias, which this architecture does not"):
        read(tmp_path, gptq_settings(4, 32), {**write.gptq(w), "bias": bias}, w.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    ("packing", "version"),
    [("auto_round:auto_gptq", 1), ("auto_round", 2), ("auto_round:gptqmodel", 2)],
)
def test_auto_round(tmp_path: Path, bits: int, packing: str, version: int) -> None:
    w = random_matrix(np.random.default_rng(bits), 32, 96, bits=bits, group_size=64)
    w = write.with_zeros(w, np.maximum(w.zeros, 1))
    settings = gptq_settings(bits, 64, packing_format=packing)
    settings["quant_method"] = "auto-round"
    check(tmp_path, settings, write.gptq(w, version=version, g_idx=False), w)
    settings.update(quant_method="intel/auto-round", bits=4 if bits == 2 else 2)
    for name in (UP, r"layers\.0\.mlp"):
        settings["extra_config"] = {name: {"bits": bits}, "lm_head": {"bits": 16}}
        check(tmp_path, settings, write.gptq(w, version=version, g_idx=False), w)


def test_auto_round_like_others(tmp_path: Path) -> None:
    w = random_matrix(np.random.default_rng(0), 32, 96, bits=4, group_size=32)
    settings = {**awq_settings(32, "?"), "quant_method": "auto-round"}
    settings["packing_format"] = "auto_round:auto_awq"
    check(tmp_path, settings, write.awq_gemm(w), w)
    packed = packed_settings(4, 32, symmetric=False, packing_format="auto_round:llm_compressor")
    packed["quant_method"] = "auto-round"
    check(tmp_path, packed, write.pack_quantized(w), w)


@pytest.mark.parametrize(("m", "k", "group_size"), SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_awq_gemm(tmp_path: Path, m: int, k: int, group_size: int, symmetric: bool) -> None:
    w = random_matrix(
        np.random.default_rng(k), m, k, bits=4, group_size=group_size, symmetric=symmetric
    )
    check(tmp_path, awq_settings(group_size, "GEMM"), write.awq_gemm(w), w)
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": group_size}
    check(tmp_path, older, write.awq_gemm(w), w)


@pytest.mark.parametrize(
    ("k", "group_size"), [(128, 32), (128, 64), (576, 64), (256, 128), (1152, 128), (128, -1)]
)
def test_awq_gemv(tmp_path: Path, k: int, group_size: int) -> None:
    w = random_matrix(np.random.default_rng(k), 16, k, bits=4, group_size=group_size)
    check(tmp_path, awq_settings(group_size, "gemv"), write.awq_gemv(w), w)


@pytest.mark.parametrize("version", ["gemv_fast", "llm-awq"])
@pytest.mark.parametrize(("k", "group_size"), [(128, 32), (192, 64), (256, 128)])
def test_awq_four_rows_at_a_time(tmp_path: Path, k: int, group_size: int, version: str) -> None:
    """Zero points are stored multiplied with the scales, as fp16: they arrive as these offsets."""
    w = random_matrix(np.random.default_rng(k), 16, k, bits=4, group_size=group_size)
    name = "scaled_zeros" if version == "llm-awq" else "qzeros"
    tensors = write.awq_fast(w, zeros_name=name)
    q = read(tmp_path, awq_settings(group_size, version), tensors, w.shape)
    scales = w.scales.astype(np.float32)
    offsets = -(scales * w.zeros).astype(np.float16).astype(np.float32)
    want = scales[:, w.groups] * w.codes.astype(np.float32) + offsets[:, w.groups]
    assert np.array_equal(q.dequantize(), want)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("m", "k", "group_size"), SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_pack_quantized(
    tmp_path: Path, bits: int, m: int, k: int, group_size: int, symmetric: bool, old: bool
) -> None:
    rng = np.random.default_rng([bits, k])
    settings = packed_settings(bits, group_size, symmetric=symmetric)
    for act_order in (False, True):
        w = random_matrix(
            rng, m, k, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order
        )
        tensors = write.pack_quantized(w, symmetric=symmetric, old=old, g_idx=act_order)
        if symmetric:
            q = read(tmp_path, settings, tensors, w.shape)
            assert np.array_equal(q.dequantize(), w.weight())
            assert (q.offset_kind, q.zero) == ("none", 2 ** (bits - 1))
        else:
            q = check(tmp_path, settings, tensors, w)
        assert (q.order is not None) == (not np.array_equal(w.groups, np.sort(w.groups)))


def test_pack_quantized_parts_of_other_versions(tmp_path: Path) -> None:
    w = random_matrix(np.random.default_rng(0), 24, 64, bits=4, group_size=16)
    settings = packed_settings(4, 16, symmetric=False)
    tensors = write.pack_quantized(w)
    plain = {**tensors, "weight_zero_point": (w.zeros - 8).astype(np.int8)}
    check(tmp_path, settings, plain, w)
    plain["weight_zero_point"][3, 1] = 8
    with pytest.raises(ValueError, match="weight_zero_point does not fit in 4 bits"):
        read(tmp_path, settings, plain, w.shape)
    unset = {**tensors, "weight_g_idx": np.full(64, -1, np.int32)}
    assert check(tmp_path, settings, unset, w).order is None
    small = {**tensors, "weight_shape": np.array([24, 64], np.int32)}
    check(tmp_path, settings, small, w)
    small["weight_shape"][1] = 63
    with pytest.raises(ValueError, match=r"weight_shape is \[24, 63\], must be \[24, 64\]"):
        read(tmp_path, settings, small, w.shape)
    assert write.whole_words(np.ones(20), 3) != write.stream(np.ones(20), 3)
    w = random_matrix(np.random.default_rng(0), 20, 20, bits=3, group_size=4)
    for old in (False, True):
        with pytest.raises(UnsupportedError, match="there is no telling which"):
            read(
                tmp_path,
                packed_settings(3, 4, symmetric=False),
                write.pack_quantized(w, old=old),
                w.shape,
            )


def test_pack_quantized_targets(tmp_path: Path) -> None:
    settings = packed_settings(4, 16, symmetric=True)
    exact = packed_settings(8, -1, symmetric=True)["config_groups"]["group_0"]
    settings["config_groups"]["by_name"] = {**exact, "targets": [UP, r"re:.*down_proj"]}
    settings["format"] = "mixed-precision"
    for group in settings["config_groups"].values():
        group["format"] = "pack-quantized"
    for module, bits, group_size in (
        (UP, 8, -1),
        ("model.layers.1.mlp.down_proj", 8, -1),
        ("model.layers.1.mlp.up_proj", 4, 16),
    ):
        w = random_matrix(
            np.random.default_rng(0), 24, 64, bits=bits, group_size=group_size, symmetric=True
        )
        tensors = write.pack_quantized(w, symmetric=True)
        q = open_module(tmp_path, settings, tensors, w.shape, module=module).load()
        assert isinstance(q, QuantTensor)
        assert np.array_equal(q.dequantize(), w.weight())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize(("k", "group_size"), [(64, 16), (96, 96), (128, 64), (64, -1)])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.uint16])
def test_hqq(tmp_path: Path, bits: int, k: int, group_size: int, kind: Any) -> None:
    rng = np.random.default_rng([bits, k])
    w = random_matrix(rng, 16, k, bits=bits, group_size=group_size)
    zeros = rng.normal(2 ** (bits - 1), 1, w.zeros.shape).astype(np.float32)
    tensors = write.hqq(w, zeros)
    for name in ("scale", "zero"):
        values = tensors[name].astype(np.float32)
        cut = (values.view(np.uint32) >> 16).astype(np.uint16)
        tensors[name] = cut if kind == np.uint16 else values.astype(kind)
        if kind == np.uint16:
            values = (cut.astype(np.uint32) << 16).view(np.float32)
        if name == "zero":
            zeros = values.astype(np.float16).astype(np.float32).reshape(w.zeros.shape)
        else:
            w = replace(w, scales=values.reshape(w.scales.shape))
    q = read(tmp_path, {"quant_method": "hqq"}, tensors, w.shape)
    scales = w.scales.astype(np.float16).astype(np.float32)
    want = (w.codes.astype(np.float32) - zeros[:, w.groups]) * scales[:, w.groups]
    assert np.array_equal(q.dequantize(), want)
    params = {"nbits": bits, "group_size": None if group_size == -1 else group_size, "axis": 1}
    bare = {name: tensors[name] for name in ("W_q", "scale", "zero")}
    for config in ({"weight_quant_params": params}, {"mlp.up_proj": params}, {"up_proj": params}):
        settings = {"quant_method": "hqq", "quant_config": config}
        assert np.array_equal(read(tmp_path, settings, bare, w.shape).dequantize(), want)
    for view in (np.float16, np.float32):
        if tensors["W_q"].dtype == np.uint8 or view == np.float32:
            floats = {**tensors, "W_q": tensors["W_q"].view(view)}
            other = read(tmp_path, {"quant_method": "hqq"}, floats, w.shape)
            assert np.array_equal(other.codes, q.codes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"axis": np.array(0, np.int32)}, "HQQ with axis 0 is not supported .*run across rows"),
        ({"group_size": np.array(48, np.int32)}, "groups of 48 reach from one row of 64 weights"),
        ({"group_size": np.array(6, np.int32)}, "group_size 6 is not a multiple of 4"),
        ({"nbits": np.array(1.58, np.float32)}, "1.58.* bits is not supported"),
        ({"nbits": np.array([4, 4], np.int32)}, "one number is needed"),
        ({"quant_zero": np.array(1, np.uint8)}, "HQQ with quant_zero is not supported"),
        ({"shape": np.array([64, 16], np.int64)}, r"shape is \[64, 16\], must be \[16, 64\]"),
    ],
)
def test_hqq_that_is_refused(tmp_path: Path, changes: Tensors, text: str) -> None:
    w = random_matrix(np.random.default_rng(0), 16, 64, bits=4, group_size=16)
    tensors = {**write.hqq(w, w.zeros.astype(np.float16)), **changes}
    with pytest.raises((TmacError, ValueError), match=text):
        read(tmp_path, {"quant_method": "hqq"}, tensors, w.shape)


def test_hqq_without_settings(tmp_path: Path) -> None:
    w = random_matrix(np.random.default_rng(0), 16, 64, bits=4, group_size=16)
    tensors = write.hqq(w, w.zeros.astype(np.float16), settings=False)
    with pytest.raises(ModelFileError, match="nbits stands neither with the module nor in the"):
        read(tmp_path, {"quant_method": "hqq"}, tensors, w.shape)
    settings = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": "4"}}}
    with pytest.raises(ModelFileError, match="nbits must be a number, found '4'"):
        read(tmp_path, settings, tensors, w.shape)


def test_awq_gemv_fast_of_a_shape_it_cannot_hold(tmp_path: Path) -> None:
    w = random_matrix(np.random.default_rng(0), 16, 96, bits=4, group_size=32)
    with pytest.raises(UnsupportedError, match="k of 64"):
        read(tmp_path, awq_settings(32, "gemv_fast"), write.awq_gemv(w), w.shape)


# Whole folders


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
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
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
