"""The quantisers against the definitions of what they minimise."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_checkpoints import TINY
from tmac_py.converters.llama_forward import STAGES, Layer, LlamaForward
from tmac_py.converters.quantizers import (
    METHODS,
    Inputs,
    Quantizer,
    Settings,
    awq,
    bcq,
    feedback,
    gptq,
    hqq,
)
from tmac_py.quant import QuantTensor, encode_groups, quantize_rtn

Floats = NDArray[np.float32]


def weights(m: int = 40, k: int = 96, seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).standard_t(4, (m, k)) * 0.05).astype(np.float32)


def correlated(tokens: int = 500, k: int = 96, seed: int = 1) -> Inputs:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(tokens, k // 4)) @ rng.normal(size=(k // 4, k))
    return Inputs((mixed + 0.3 * rng.normal(size=(tokens, k))).astype(np.float32))


def independent(k: int = 96) -> Inputs:
    """Inputs of different sizes whose Hessian is diagonal to the last bit."""
    sizes = np.linspace(0.5, 2, k).astype(np.float32)
    return Inputs(np.diag(sizes))


def output_error(w: Floats, q: QuantTensor, hessian: NDArray[np.float64]) -> float:
    e = (q.dequantize() - w).astype(np.float64)
    return float(np.einsum("mi,ij,mj->", e, hessian, e))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (60, 32), (20, -1)])
def test_what_comes_out_fits_and_repeats(name: str, bits: int, k: int, group_size: int) -> None:
    w, inputs = weights(33, k), correlated(k=k)
    for asym in (True,) if METHODS[name].offsets else (True, False):
        settings = Settings(bits, group_size, asym)
        q = METHODS[name].quantize(w, settings, inputs if METHODS[name].calibrated else None)
        again = METHODS[name].quantize(w, settings, inputs if METHODS[name].calibrated else None)
        assert (q.m, q.k, q.bits) == (33, k, bits)
        assert q.group_size == (k if group_size == -1 else group_size)
        assert q.offset_kind == ("offset" if asym else "none")
        assert q.encoding == ("bcq" if METHODS[name].binary and bits <= 4 else "uniform")
        assert np.array_equal(q.dequantize(), again.dequantize())
        spread = np.abs(w).max() - (w.min() if asym else -np.abs(w).max())
        rms = np.sqrt(np.square(q.dequantize() - w).mean())
        assert rms < spread / 2**bits


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(name: str, bad: float) -> None:
    w = weights(4, 32)
    w[2, 5] = bad
    inputs = correlated(k=32) if METHODS[name].calibrated else None
    with pytest.raises(ValueError, match="not finite"):
        METHODS[name].quantize(w, Settings(3, 32, True), inputs)


@pytest.mark.parametrize("name", METHODS)
def test_scales_beyond_fp16_are_refused(name: str) -> None:
    w = np.tile(np.array([[3e6, -3e6, 0, 1e6]], np.float32), (2, 2))
    with pytest.raises(ValueError, match="65504"):
        METHODS[name].quantize(w, Settings(2, 8, True), correlated(k=8))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_groups_stay_what_they_are(name: str, value: float) -> None:
    w = np.full((3, 40), value, np.float32)
    q = METHODS[name].quantize(w, Settings(3, 16, True), correlated(k=40))
    assert np.allclose(q.dequantize(), value, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("group_size", [16, 40, -1])
def test_gptq_lowers_the_error_of_the_outputs(bits: int, asym: bool, group_size: int) -> None:
    w, inputs = weights(), correlated()
    hessian = inputs.x.astype(np.float64).T @ inputs.x
    settings = Settings(bits, group_size, asym)
    error = output_error(w, gptq.quantize_gptq(w, settings, inputs), hessian)
    for rounded in ("rtn", "mse"):
        assert error < 0.7 * output_error(w, METHODS[rounded].quantize(w, settings, None), hessian)


@pytest.mark.parametrize("asym", [False, True])
def test_gptq_of_independent_inputs_is_rounding(asym: bool) -> None:
    w, inputs = weights(), independent()
    off = inputs.hessian() - np.diag(inputs.hessian().diagonal())
    assert (off == 0).all()
    q = gptq.quantize_gptq(w, Settings(3, 32, asym), inputs)
    want = quantize_rtn(
        w,
        bits=3,
        group_size=32,
        asym=asym,
        search="mse",
        importance=feedback.damped(inputs.hessian()).diagonal().astype(np.float32),
    )
    assert np.array_equal(q.codes, want.codes)
    assert np.array_equal(q.scales, want.scales)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("k", [96, 88])
def test_gptq_is_the_algorithm_of_the_paper(act_order: bool, k: int) -> None:
    """Frantar et al., 2022, algorithm 1: with the Cholesky factor of the inverse Hessian."""
    w, inputs, group_size = weights(k=k), correlated(k=k), 24
    hessian = feedback.damped(inputs.hessian())
    size = hessian.diagonal().astype(np.float32)
    order = feedback.by_size(size) if act_order else feedback.by_group(size, group_size)
    hessian = hessian[order][:, order]
    inverse = np.linalg.cholesky(np.linalg.inv(hessian)).T
    rest = w[:, order].astype(np.float64)
    codes = np.empty(w.shape, np.uint8)
    values = np.empty(w.shape)
    for j in range(k):
        if j % group_size == 0:
            columns = slice(j, j + group_size)
            _, s, o = encode_groups(
                rest[:, None, columns].astype(np.float32),
                3,
                True,
                "mse",
                hessian.diagonal()[None, columns].astype(np.float32),
            )
            scale, offset = s[:, 0].astype(np.float64), o[:, 0].astype(np.float64)
        codes[:, j] = np.clip(np.rint((rest[:, j] - offset) / scale), 0, 7)
        values[:, j] = codes[:, j] * scale + offset
        error = (rest[:, j] - values[:, j]) / inverse[j, j]
        rest[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
    q = gptq.quantize_gptq(w, Settings(3, group_size, True, act_order), inputs)
    # float32 against float64: a weight that is too close to call changes the columns after it.
    same = (q.codes if act_order else q.codes[:, order]) == codes
    assert same.mean() > 0.98
    assert np.isclose(q.dequantize()[:, order], values, atol=1e-4).mean() > 0.98
    if act_order:
        assert q.order is not None
        assert np.array_equal(q.order, order)
    else:
        assert q.order is None


def test_columns_go_by_the_size_of_their_inputs() -> None:
    size = np.array([1, 9, 4, 2, 5, 5, 7, 30, 99, 98], np.float32)
    assert feedback.by_size(size).tolist() == [8, 9, 7, 1, 6, 4, 5, 2, 3, 0]
    assert feedback.by_group(size, 4).tolist() == [7, 6, 4, 5, 1, 2, 3, 0, 8, 9]
    assert feedback.by_group(size, 10).tolist() == feedback.by_size(size).tolist()


@pytest.mark.parametrize("quantize", [gptq.quantize_gptq, bcq.quantize_bcq])
def test_act_order_lowers_the_error_of_inputs_of_different_sizes(quantize: Quantizer) -> None:
    w, inputs = weights(64, 192), correlated(k=192)
    inputs.x[:] *= np.random.default_rng(5).permutation(np.geomspace(0.1, 10, 192))
    hessian = inputs.x.astype(np.float64).T @ inputs.x
    plain, ordered = (
        output_error(w, quantize(w, Settings(3, 32, True, act_order), inputs), hessian)
        for act_order in (False, True)
    )
    assert ordered < 0.8 * plain


def test_gptq_of_inputs_that_are_always_zero() -> None:
    inputs = correlated()
    inputs.x[:, [3, 50]] = 0
    q = gptq.quantize_gptq(weights(), Settings(4, 32, True), inputs)
    assert np.isfinite(q.dequantize()).all()
    nothing = gptq.quantize_gptq(weights(), Settings(4, 32, True), Inputs(np.zeros_like(inputs.x)))
    assert np.array_equal(
        nothing.codes, METHODS["mse"].quantize(weights(), Settings(4, 32, True), None).codes
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("k", "group_size"), [(96, 32), (60, 32)])
def test_hqq_is_never_worse_on_its_objective(bits: int, k: int, group_size: int) -> None:
    w, settings = weights(k=k), Settings(bits, group_size, True)
    columns = [slice(start, start + group_size) for start in range(0, k, group_size)]
    size = {
        name: np.abs(METHODS[name].quantize(w, settings, None).dequantize() - w) ** hqq.NORM
        for name in ("hqq", "rtn")
    }
    groups = {
        name: np.stack([error[:, c].sum(axis=1) for c in columns]) for name, error in size.items()
    }
    assert (groups["hqq"] <= groups["rtn"] * (1 + 1e-3)).all()
    if bits <= 4:
        assert groups["hqq"].sum() < 0.99 * groups["rtn"].sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bcq_errors_fall_with_every_step(bits: int) -> None:
    w = np.ascontiguousarray(weights(50, 64).T)
    for start in (bcq._greedy(w, bits), bcq._evenly_spaced(w, bits)):
        last = np.full(w.shape[1], np.inf, np.float32)
        for codes, solution in islice(bcq.alternate(w, start, bits), 8):
            error = bcq.squared_error(w, codes, solution, bits)
            assert (error <= last * (1 + 1e-4) + 1e-7).all()
            last = error


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_bcq_finds_what_it_can_hold(bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = np.stack([rng.permutation(64) % (1 << bits) for _ in range(8)]).astype(np.uint8)
    scales = np.array([0.1, 0.25, 0.6, 1.5])[:bits]
    signs = (codes[..., None] >> np.arange(bits) & 1) * 2.0 - 1
    w = (signs @ scales + 0.125).astype(np.float32)
    q = bcq.quantize_bcq(w, Settings(bits, 64, True), None)
    assert np.abs(q.dequantize() - w).max() < 2e-3  # fp16


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bcq_is_better_than_even_steps(bits: int) -> None:
    w, settings = weights(64, 128), Settings(bits, 32, True)
    error = {
        name: np.square(METHODS[name].quantize(w, settings, None).dequantize() - w)
        .reshape(64, 4, 32)
        .sum(axis=2)
        for name in ("bcq", "mse")
    }
    assert (error["bcq"] <= error["mse"] * (1 + 1e-3)).all()
    assert error["bcq"].sum() < 0.85 * error["mse"].sum()


def layer(seed: int = 0) -> Layer:
    rng = np.random.default_rng(seed)
    return {
        name.removeprefix("model.layers.0.").removesuffix(".weight"): rng.normal(
            1 if len(shape) == 1 else 0, 0.1, shape
        ).astype(np.float32)
        for name, shape in TINY.tensor_shapes().items()
        if ".layers.0." in name
    }


def run(layer: Layer, seen: dict[tuple[str, ...], Inputs] | None = None) -> Floats:
    rng = np.random.default_rng(9)
    outliers = 1 + 20 * (rng.random(TINY.hidden_size) < 0.03)
    hidden = (rng.normal(size=(2, 24, TINY.hidden_size)) * outliers).astype(np.float32)
    forward = LlamaForward(TINY, 24)

    def visit(stage: tuple[str, ...], x: Floats) -> None:
        if seen is not None:
            seen[stage] = Inputs(x)

    forward.run_layer(layer, hidden, visit)
    return hidden


def test_awq_scales_leave_the_function_as_it_is() -> None:
    plain, folded = layer(), layer()
    seen: dict[tuple[str, ...], Inputs] = {}
    want = run(plain, seen)
    settings = {name: Settings(3, 32, True) for name, w in plain.items() if w.ndim == 2}
    awq.fold_scales(folded, {s: awq.Seen.of(x) for s, x in seen.items()}, settings, TINY)
    for name in ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"):
        assert np.abs(folded[name] / plain[name] - 1).max() > 0.05
    assert np.abs(run(folded) - want).max() < 1e-5 * np.abs(want).max()


def test_awq_scales_of_one_change_nothing() -> None:
    plain, folded = layer(), layer()
    for stage, producer in zip(
        STAGES,
        ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"),
        strict=True,
    ):
        ones = np.ones(plain[stage[0]].shape[1], np.float32)
        awq.fold(folded, stage, producer, ones, TINY)
    assert all(np.array_equal(folded[name], plain[name]) for name in plain)
    inputs = Inputs(np.ones((3, TINY.hidden_size), np.float32))
    w, settings = plain["mlp.up_proj"], Settings(3, 32, True)
    q, rounded = (METHODS[name].quantize(w, settings, inputs) for name in ("awq", "mse"))
    assert np.array_equal(q.codes, rounded.codes)
    assert np.array_equal(q.codes, METHODS["mse"].quantize(w, settings, None).codes)


def test_awq_lowers_the_error_of_the_outputs() -> None:
    plain, seen = layer(), dict[tuple[str, ...], Inputs]()
    run(plain, seen)
    for stage in (STAGES[0], STAGES[2]):  # those whose inputs have outliers here
        matrices = [plain[name] for name in stage]
        settings = Settings(3, 32, True)
        x = seen[stage].x
        scales = awq.search_scales(matrices, [settings] * len(matrices), seen[stage].mean_abs, x)
        found = sum(awq._output_error(w, settings, scales, x) for w in matrices)
        plain_error = sum(awq._output_error(w, settings, np.ones_like(scales), x) for w in matrices)
        assert found < 0.8 * plain_error


def test_a_stage_with_kept_codes_is_not_scaled() -> None:
    plain, folded = layer(), layer()
    seen: dict[tuple[str, ...], Inputs] = {}
    run(plain, seen)
    kept = {"mlp.up_proj", "self_attn.k_proj", "self_attn.v_proj"}
    settings = {
        name: Settings(3, 32, True) for name, w in plain.items() if w.ndim == 2 and name not in kept
    }
    awq.fold_scales(folded, {s: awq.Seen.of(x) for s, x in seen.items()}, settings, TINY)
    assert all(np.array_equal(folded[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["bcq", "gptq", "awq"])
def test_activations_that_are_not_finite_are_refused(name: str) -> None:
    inputs = correlated()
    inputs.x[7, 7] = np.inf
    with pytest.raises(ValueError, match="activations of the calibration text"):
        METHODS[name].quantize(weights(), Settings(3, 32, True), inputs)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bcq_with_inputs_lowers_the_error_of_the_outputs(bits: int) -> None:
    w, inputs = weights(), correlated()
    hessian = inputs.x.astype(np.float64).T @ inputs.x
    settings = Settings(bits, 32, True)
    error = output_error(w, bcq.quantize_bcq(w, settings, inputs), hessian)
    assert error < 0.7 * output_error(w, bcq.quantize_bcq(w, settings, None), hessian)
    assert error < 0.7 * output_error(w, METHODS["mse"].quantize(w, settings, None), hessian)
