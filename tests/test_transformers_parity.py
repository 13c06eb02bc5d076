"""The decoder against transformers: tiny models that switch every feature of the family on.

tests/golden/tiny-*.npz hold folders as transformers saves them and the logits it computes
(make_tiny_models.py). 8 bits hold their weights exactly, so every difference comes from the
decoder. There are two comparisons:

- int8 tables against transformers with the same roundings put into it. Where no rounding is too
  close to call, both are float32 evaluations of one function and differ by round-off only.
- exact tables against plain transformers. What is between them: activations rounded to 14 bits per
  block of 16, which is 6e-5 of a product, and keys and values rounded to 11 bits, 2e-4 of each.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from parity import assert_top1_agrees, difference, logits_in_pieces
from tmac_py import Model, _core
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.checkpoint import FloatMatrix
from tmac_py.lutfile import LutFile
from tmac_py.quant import QuantTensor

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("llama3", "linear", "mistral", "yarn", "dynamic")
REAL = Path(__file__).resolve().parents[2] / "shared" / "checkpoints" / "smollm2-2layer-hf-bf16"
WINDOW = 7
TABLE_TOKENS = 16
"""The most tokens that are multiplied by table lookup."""

ROUND_OFF = 4e-5
"""make_tiny_models.py calls a position settled if noise of four times float32's unit round-off in
the input of every product moves its logits by less than 2e-5. Twice that is allowed."""

TABLES_ENERGY = 4e-5
"""Error of int8 tables as a part of a product's energy (docs/kernels.md)."""

EIGHT_BITS_ENERGY = 2.5e-5
"""The same for weights of 8 bits: the largest of 32 normal weights is about 2.2 deviations, 128
steps reach that far, and rounding errs by a step / sqrt(12)."""


class Golden:
    """One golden file: folder and arrays."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"tiny-{name}.npz") as arrays:
            everything = dict(arrays)
        self.files = {n: a.tobytes() for n, a in everything.items() if "." in n}
        self.ids: NDArray[np.int32] = everything["ids"]
        self.logits: NDArray[np.float32] = everything["logits"]
        self.logits_int8: NDArray[np.float32] = everything["logits_int8"]
        self.settled: NDArray[np.bool_] = everything["settled"]
        self.group_size = int(everything["group_size"])
        self.bound = 2 * float(everything["exact_error"])
        """For exact tables. The largest error that the same roundings cause within transformers is
        one draw of it, ours is another: roundings that are too close to call fall differently, and
        all after them. Of thousands of about normal errors the largest changes little from draw to
        draw (20 % as measured): twice is beyond chance."""

    def folder(self, path: Path, **changes: Any) -> Path:
        """The folder as transformers saved it, with ``changes`` to its config.json."""
        path.mkdir()
        for name, content in self.files.items():
            (path / name).write_bytes(content)
        if changes:
            config = json.loads(self.files["config.json"])
            assert set(changes) <= set(config)
            (path / "config.json").write_text(json.dumps({**config, **changes}))
        return path

    def convert(self, path: Path, **changes: Any) -> Path:
        """That folder as a .lut file of 8 bits."""
        folder, out = self.folder(path / "hf", **changes), path / "model.lut"
        convert(folder, out, bits=8, head_bits=8, group_size=self.group_size)
        return out


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture
def lut(golden: Golden, tmp_path: Path) -> Path:
    return golden.convert(tmp_path)


def relative_energy(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    return float(np.square(ours - theirs).sum() / np.square(theirs - theirs.mean()).sum())


def test_the_golden_models_switch_everything_on() -> None:
    configs = [json.loads(Golden(name).files["config.json"]) for name in NAMES]
    assert {c["model_type"] for c in configs} == {"llama", "mistral"}
    assert {c["dtype"] for c in configs} == {"float16", "bfloat16"}
    assert {c["tie_word_embeddings"] for c in configs} == {False, True}
    kinds = {c["rope_parameters"]["rope_type"] for c in configs}
    assert kinds == {"default", "linear", "dynamic", "llama3", "yarn"}
    assert any(c["head_dim"] * c["num_attention_heads"] != c["hidden_size"] for c in configs)
    shared = {c["num_attention_heads"] // c["num_key_value_heads"] for c in configs}
    assert shared == {1, 2, 4}
    assert [c.get("sliding_window") for c in configs].count(WINDOW) == 1
    assert any(c["hidden_size"] % 32 and c["intermediate_size"] % 32 for c in configs)


def test_eight_bits_hold_the_weights_exactly(golden: Golden, tmp_path: Path) -> None:
    lut = golden.convert(tmp_path)
    with LutFile.open(lut) as file:
        for tensor in open_checkpoint(tmp_path / "hf").tensors:
            want = tensor.load()
            if isinstance(want, np.ndarray):
                assert np.array_equal(file.float(tensor.name), want)
                continue
            assert isinstance(want, FloatMatrix)
            packed, spec = file.linear(tensor.name)
            codes, scales, offsets = _core.unpack(
                packed,
                m=spec.m,
                k=spec.k,
                bits=spec.bits,
                group_size=spec.group_size,
                offset_kind=spec.offset_kind,
            )
            got = QuantTensor(
                codes, scales, offsets, spec.bits, spec.group_size, spec.offset_kind, spec.zero
            )
            assert np.array_equal(got.dequantize(), want[slice(0, None)])


def test_exact_logits_are_those_of_transformers(golden: Golden, lut: Path) -> None:
    with Model.load(lut, threads=2, tables="exact") as model:
        ours = model.logits(golden.ids)
    assert difference(ours, golden.logits).max() < golden.bound
    assert golden.bound < 0.01 * golden.logits.std()
    assert_top1_agrees(ours, golden.logits, golden.bound, decided=0.9)


def test_int8_logits_are_those_of_transformers_with_tables(golden: Golden, lut: Path) -> None:
    with Model.load(lut, threads=2, tables="int8") as model:
        ours = logits_in_pieces(model, golden.ids, TABLE_TOKENS)
    assert golden.settled.mean() > 0.65
    assert difference(ours, golden.logits_int8)[golden.settled].max() < ROUND_OFF
    # Four of a layer's products stand in a row, then comes lm_head; their errors add up, and where
    # attention is sharp, as in these models, the softmax may double them.
    products = 4 * model.config.num_hidden_layers + 1
    assert relative_energy(ours, golden.logits) < 2 * products * TABLES_ENERGY


def test_prefill_equals_single_steps_bit_for_bit(golden: Golden, lut: Path) -> None:
    with Model.load(lut, threads=2, tables="exact") as model:
        together = model.logits(golden.ids)
        assert model.new_cache().n_ctx == 64 > len(golden.ids)
        assert np.array_equal(together, logits_in_pieces(model, golden.ids, 1))


def test_few_tokens_equal_single_steps_bit_for_bit(golden: Golden, lut: Path) -> None:
    with Model.load(lut, threads=2, tables="int8") as model:
        together = logits_in_pieces(model, golden.ids, TABLE_TOKENS)
        assert np.array_equal(together, logits_in_pieces(model, golden.ids, 1))


def test_only_the_window_counts(tmp_path: Path) -> None:
    golden = Golden("mistral")
    with Model.load(golden.convert(tmp_path), threads=2, tables="exact") as model:
        ids = golden.ids
        n_layers, n = model.config.num_hidden_layers, len(ids)
        assert model.config.sliding_window == WINDOW < n
        want = model.logits(ids)
        changed = ids.copy()
        changed[0] = (ids[0] + 1) % model.config.vocab_size
        reach = n_layers * (WINDOW - 1) + 1  # every layer looks WINDOW - 1 positions back
        got = model.logits(changed)
        assert np.array_equal(got[reach:], want[reach:])
        assert (difference(got, want)[:reach] > 0).all()
        for n_ctx in (n, n + 1, model.n_ctx):
            cache = model.new_cache(n_ctx)
            parts = [model.forward(part, cache, "all") for part in np.split(ids, [5, 20, 21])]
            assert np.array_equal(np.concatenate(parts), want)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("llama3", "rope_parameters", {"factor": 4.0}),
        ("llama3", "rope_parameters", {"rope_type": "default"}),
        ("llama3", "rope_parameters", {"original_max_position_embeddings": 16}),
        ("linear", "rope_parameters", {"factor": 2.0}),
        ("linear", "rope_parameters", {"rope_type": "default"}),
        ("mistral", "sliding_window", WINDOW + 1),
        ("mistral", "sliding_window", None),
        ("mistral", "rope_parameters", {"rope_theta": 10000.0}),
        ("yarn", "rope_parameters", {"rope_type": "default"}),
        ("yarn", "rope_parameters", {"attention_factor": 1.0}),
        ("yarn", "rope_parameters", {"beta_slow": 1.0}),
        ("dynamic", "rope_parameters", {"rope_theta": 10000.0}),
        ("dynamic", "rms_norm_eps", 1e-5),
    ],
)
def test_every_setting_shows(tmp_path: Path, name: str, key: str, value: Any) -> None:
    """The comparison would notice a setting that is ignored or misread."""
    golden = Golden(name)
    if isinstance(value, dict):
        value = {**json.loads(golden.files["config.json"])[key], **value}
    lut = golden.convert(tmp_path, **{key: value})
    with Model.load(lut, threads=2, tables="exact") as model:
        assert difference(model.logits(golden.ids), golden.logits).max() > 10 * golden.bound


def test_dynamic_rope_is_plain_within_the_context(tmp_path: Path) -> None:
    golden = Golden("dynamic")
    given = json.loads(golden.files["config.json"])["rope_parameters"]
    (tmp_path / "plain").mkdir()
    plain = golden.convert(tmp_path / "plain", rope_parameters={**given, "rope_type": "default"})
    with Model.load(golden.convert(tmp_path)) as a, Model.load(plain) as b:
        assert np.array_equal(a.logits(golden.ids), b.logits(golden.ids))


@pytest.mark.skipif(
    not REAL.is_dir(), reason="the sample checkpoints are not beside the repository"
)
def test_two_layers_of_a_real_model_at_8_bits(tmp_path: Path) -> None:
    """Transformers had the bf16 weights, so it is their rounding to 8 bits that is seen: once in
    the embedding, once in lm_head, and, as the stream is mostly the embedding after two layers, at
    most as much again in these."""
    with np.load(REAL / "reference.npz") as reference:
        ids, theirs = reference["ids"], reference["logits"]
    convert(REAL, tmp_path / "m.lut", bits=8, head_bits=8, group_size=32)
    with Model.load(tmp_path / "m.lut", threads=2, tables="exact") as model:
        ours = model.logits(ids)
    allowed = 4 * EIGHT_BITS_ENERGY
    assert relative_energy(ours, theirs) < allowed
    bound = 8 * float(np.sqrt(allowed) * theirs.std())  # 8: some tokens are harder than others
    assert difference(ours, theirs).max() < bound
    assert_top1_agrees(ours, theirs, bound, decided=0.2)
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.95
