"""Conversions that look at activations, and the choice of bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from test_transformers_parity import NAMES, Golden
from tiny_checkpoints import SPEAKING, gguf_tensors, random_weights, write_gguf, write_speaking
from tmac_py import Model, parallel
from tmac_py.converters import calibration, convert, convert_checkpoint, open_checkpoint
from tmac_py.converters.allocation import Choice, allocate
from tmac_py.converters.checkpoint import HEADS, Checkpoint
from tmac_py.converters.llama_forward import LlamaForward
from tmac_py.converters.model_layers import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    as_floats,
    embed,
    find,
    input_sizes,
    layers_of,
)
from tmac_py.converters.options import QuantOptions
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.lutfile import LutFile
from tmac_py.quant import QuantTensor

Floats = NDArray[np.float32]
FEW = {"calibration_tokens": 96}
CASES_OF_THREADS: list[tuple[str, dict[str, Any]]] = [
    ("hqq", {}),
    ("bcq", FEW),
    ("gptq", FEW),
    ("gptq", {"act_order": True, **FEW}),
    ("awq", FEW),
]


def float_logits(checkpoint: Checkpoint, ids: NDArray[np.int32]) -> Floats:
    forward = LlamaForward(checkpoint.config, len(ids))
    hidden = embed(find(checkpoint, EMBEDDING).load(), ids[None])
    for tensors in layers_of(checkpoint):
        layer = {name: as_floats(tensor.load()) for name, tensor in tensors.items()}
        forward.run_layer(layer, hidden, lambda _stage, _x: None)
    x = forward.normalise(hidden, as_floats(find(checkpoint, FINAL_NORM).load()))[0]
    head = EMBEDDING if checkpoint.config.tie_word_embeddings else LM_HEAD
    logits: Floats = x @ as_floats(find(checkpoint, head).load()).T
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_the_float_layers_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    golden = Golden(name)
    checkpoint = open_checkpoint(golden.folder(tmp_path / "hf"))
    difference = np.abs(float_logits(checkpoint, golden.ids) - golden.logits).max()
    assert difference < 1e-4 * np.abs(golden.logits).max()


def bits_of(path: Path) -> dict[str, int]:
    with LutFile.open(path) as file:
        return {
            name: entry.spec.bits
            for name, entry in file.tensors.items()
            if entry.kind == "linear" and entry.spec is not None
        }


def bits_per_weight(path: Path) -> float:
    with LutFile.open(path) as file:
        linears = [entry for entry in file.tensors.values() if entry.kind == "linear"]
        weights = sum(entry.shape[0] * entry.shape[1] for entry in linears)
        return sum(entry.nbytes for entry in linears) * 8 / weights


@pytest.mark.parametrize(
    ("quant", "options"),
    [
        ("bcq", {}),
        ("gptq", {}),
        ("awq", {}),
        ("bcq", {"act_order": True}),
        ("gptq", {"act_order": True}),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_calibrated_model_is_nearer_than_a_rounded_one(
    quant: str, options: dict[str, Any], tied: bool, tmp_path: Path
) -> None:
    weights = random_weights(dataclasses.replace(SPEAKING, tie_word_embeddings=tied))
    rng = np.random.default_rng(3)  # inputs that depend on each other, as those of real models do
    low_rank = rng.normal(size=(400, 12)) @ rng.normal(size=(12, 256))
    weights[EMBEDDING] = (0.05 * low_rank).astype(np.float32)
    for w in weights.values():
        if w.ndim == 1:
            w[::37] *= 8  # and of different sizes
    folder = write_speaking(tmp_path / "m", weights, tie_word_embeddings=tied)
    ids = np.arange(40, dtype=np.int32) * 7 % 400
    want = float_logits(open_checkpoint(folder), ids)
    error = {}
    for name in ("rtn", quant):
        given = {"calibration_tokens": 2048, **options} if name == quant else {}
        convert(folder, tmp_path / "m.lut", quant=name, bits=3, **given)
        with Model.load(tmp_path / "m.lut", tables="exact") as model:
            error[name] = float(np.square(model.logits(ids) - want).mean())
    assert error[quant] < 0.95 * error["rtn"]


@pytest.mark.parametrize(("quant", "given"), CASES_OF_THREADS)
def test_equal_bytes_with_any_number_of_threads(
    quant: str, given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_speaking(tmp_path / "m")
    files = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(parallel, "default_threads", lambda threads=threads: threads)
        convert(folder, tmp_path / f"{threads}.lut", quant=quant, bits=2, **given)
        files.append((tmp_path / f"{threads}.lut").read_bytes())
    assert files[0] == files[1] == files[2]


def test_the_file_names_the_settings(tmp_path: Path) -> None:
    folder = write_speaking(tmp_path / "m")
    (tmp_path / "mine.txt").write_text("the cat sat on the mat " * 50)
    convert(
        folder,
        tmp_path / "m.lut",
        quant="gptq",
        bits=3,
        bits_for=[("down_proj", 5), ("proj", 2)],
        calibration=tmp_path / "mine.txt",
        calibration_tokens=64,
    )
    with LutFile.open(tmp_path / "m.lut") as file:
        said = file.source["quantised"]
    assert said.startswith(
        "gptq bits=3 group_size=32 bits_for=down_proj=5 bits_for=proj=2 calibration_tokens=64 "
        "calibration=mine.txt xxh3="
    )


@pytest.mark.parametrize("tied", [False, True])
def test_act_order_is_stored_for_what_has_inputs(tied: bool, tmp_path: Path) -> None:
    folder = write_speaking(tmp_path / "m", tie_word_embeddings=tied)
    for act_order in (True, False):
        convert(folder, tmp_path / "m.lut", quant="gptq", act_order=act_order, **FEW)
        with LutFile.open(tmp_path / "m.lut") as file:
            kinds = {name: entry.kind for name, entry in file.tensors.items()}
            assert ("act_order=True" in file.source["quantised"]) == act_order
        orders = {n.replace(".order", ".weight") for n, kind in kinds.items() if kind == "order"}
        linears = {name for name, kind in kinds.items() if kind == "linear"}
        assert orders == (linears - {EMBEDDING} if act_order else set())


@pytest.mark.parametrize("quant", ["bcq", "gptq", "awq"])
def test_lm_head_sees_what_it_is_multiplied_with(quant: str, tmp_path: Path) -> None:
    """Only its own bits are few; ``mse`` and, of bcq, least squares are what it gets alone."""
    weights = random_weights(SPEAKING)
    weights[FINAL_NORM][::9] *= 20
    folder = write_speaking(tmp_path / "m", weights)
    ids = np.arange(40, dtype=np.int32) * 7 % 400
    want = float_logits(open_checkpoint(folder), ids)
    error = {}
    for name in (quant, "mse"):
        given = {} if name == "mse" else {"calibration_tokens": 2048}
        convert(folder, tmp_path / "m.lut", quant=name, bits=8, bits_for=[(LM_HEAD, 3)], **given)
        with Model.load(tmp_path / "m.lut", tables="exact") as model:
            error[name] = float(np.square(model.logits(ids) - want).mean())
    assert error[quant] < 0.9 * error["mse"]


def test_the_first_pattern_wins(tmp_path: Path) -> None:
    folder = write_speaking(tmp_path / "m")
    patterns = [(r"layers\.1\..*down_proj", 5), ("down_proj|v_proj", 6), ("lm_head", 3)]
    convert(folder, tmp_path / "m.lut", bits=2, head_bits=7, bits_for=patterns)
    for name, bits in bits_of(tmp_path / "m.lut").items():
        if name == "model.layers.1.mlp.down_proj.weight":
            assert bits == 5
        elif "down_proj" in name or "v_proj" in name:
            assert bits == 6
        else:
            assert bits == (3 if name == LM_HEAD else 7 if name in HEADS else 2)


@pytest.mark.parametrize("quant", ["mse", "bcq", "gptq"])
@pytest.mark.parametrize("target", [3.0, 3.9, 5.3])
def test_the_budget_is_kept(quant: str, target: float, tmp_path: Path) -> None:
    folder = write_speaking(tmp_path / "m", num_hidden_layers=4)
    given = {} if quant == "mse" else FEW
    convert(folder, tmp_path / "m.lut", quant=quant, target_bpw=target, head_bits=4, **given)
    assert 0.99 * target <= bits_per_weight(tmp_path / "m.lut") <= target
    bits = bits_of(tmp_path / "m.lut")
    assert all(bits[name] == 4 for name in HEADS)


def test_what_suffers_most_gets_the_bits(tmp_path: Path) -> None:
    """One layer's up_proj has few values, which two bits hold exactly."""
    weights = random_weights(SPEAKING)
    easy = "model.layers.0.mlp.up_proj.weight"
    weights[easy] = np.sign(weights[easy]) * np.float32(0.0625)
    folder = write_speaking(tmp_path / "m", weights)
    convert(folder, tmp_path / "m.lut", target_bpw=4.5)
    bits = bits_of(tmp_path / "m.lut")
    assert bits[easy] == 1
    assert min(b for name, b in bits.items() if name != easy) >= 3


def test_allocation_is_the_best_one() -> None:
    """Against all combinations, where every step fits the budget exactly."""
    rng = np.random.default_rng(0)
    choices = {}
    for name in "abcd":
        size = float(rng.uniform(0.5, 2))
        choices[name] = [Choice(b, 10 * b, size * 4.0**-b) for b in range(1, 5)]
    for budget in range(40, 161, 10):
        chosen = allocate(choices, budget)
        grid = np.meshgrid(*[range(4)] * 4, indexing="ij")
        errors = sum(
            np.array([c.error for c in options])[g]
            for options, g in zip(choices.values(), grid, strict=True)
        )
        spent = sum(10 * (g + 1) for g in grid)
        best = float(np.min(errors[spent <= budget]))
        assert sum(c.nbytes for c in chosen.values()) <= budget
        assert sum(c.error for c in chosen.values()) == pytest.approx(best)


def test_kept_codes_stay_and_are_seen(tmp_path: Path) -> None:
    """A GGUF file whose k_proj is stored as codes, the rest as floats."""
    config = dataclasses.replace(SPEAKING, vocab_size=40)
    weights = random_weights(config)
    mixed = gguf_tensors(weights, config, "F16")
    codes = gguf_tensors(weights, config, "Q8_0")
    mixed |= {name: stored for name, stored in codes.items() if "attn_k." in name}
    path = write_gguf(tmp_path / "m.gguf", config, mixed)
    checkpoint = open_checkpoint(path)
    texts = np.arange(64, dtype=np.int32).reshape(2, 32) % 40
    sizes = input_sizes(checkpoint, texts)
    assert len(sizes) == 7 * config.num_hidden_layers + 1
    name = "model.layers.1.self_attn.k_proj.weight"
    stored = find(checkpoint, name).load()
    assert isinstance(stored, QuantTensor)
    out = tmp_path / "m.lut"
    (tmp_path / "text.txt").write_text("x" * 100)
    with pytest.raises(UnsupportedError, match="needs a tokenizer"):
        convert_checkpoint(checkpoint, out, QuantOptions("gptq"))
    speaking = dataclasses.replace(checkpoint, tokenizer={"tokenizer.json": b"?"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tmac_py.converters.conversion.token_texts", lambda *_: texts)
        convert_checkpoint(speaking, out, QuantOptions("awq", bits=3))
    with LutFile.open(out) as file:
        assert file.linear(name)[1].bits == 8
        assert file.linear("model.layers.1.self_attn.q_proj.weight")[1].bits == 3
        for norm, scaled in (("input_layernorm", False), ("post_attention_layernorm", True)):
            full = f"model.layers.0.{norm}.weight"
            assert np.array_equal(file.float(full), weights[full]) != scaled


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", EMBEDDING, "model.norm.weight"]
)
@pytest.mark.parametrize("quant", ["mse", "gptq", "awq"])
def test_bad_weights_name_the_tensor(name: str, quant: str, tmp_path: Path) -> None:
    weights = random_weights(SPEAKING)
    weights[name].flat[70] = np.nan
    folder = write_speaking(tmp_path / "m", weights)
    (tmp_path / "out").mkdir()
    given: dict[str, Any] = FEW if quant != "mse" else {}
    with pytest.raises(ModelFileError, match=f"{name}.*not finite"):
        convert(folder, tmp_path / "out" / "m.lut", quant=quant, **given)
    assert list((tmp_path / "out").iterdir()) == []


def test_texts_are_spread_over_the_file(tmp_path: Path) -> None:
    folder = write_speaking(tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    text = calibration.read_text(None)
    assert len(text.text.encode()) <= 200_000
    texts = calibration.token_texts(text, 512, checkpoint.tokenizer, checkpoint.config)
    assert texts.shape == (4, 128)  # no longer than the context
    assert len({tuple(piece) for piece in texts}) == 4
    everything = calibration.token_texts(text, 10**9, checkpoint.tokenizer, checkpoint.config)
    assert everything.shape[0] > 100
    assert len(calibration.token_texts(text, 50, checkpoint.tokenizer, checkpoint.config)[0]) == 50
