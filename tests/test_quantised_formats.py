"""Modules of the quantised formats: what writers of their descriptions (quantised_writers.py) store
is read back exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantised_writers as write
from quantised_writers import (
    Matrix,
    Tensors,
    awq_settings,
    gptq_settings,
    packed_settings,
    random_matrix,
)
from tiny_checkpoints import TINY, open_module, random_weights
from tmac_py.errors import ModelFileError, TmacError, UnsupportedError
from tmac_py.quant import QuantTensor

WEIGHTS = random_weights(TINY)
LINEARS = [name[:-7] for name in WEIGHTS if "_proj" in name]
UP = "model.layers.0.mlp.up_proj"


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
