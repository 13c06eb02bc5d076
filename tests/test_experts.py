"""Mixture of experts: how checkpoints store them, how tokens choose, every way to run them.

Logits are compared with transformers in test_families.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import quantised_writers as write
from checkpoint_families import SMALL
from parity import difference, logits_in_pieces
from quantised_writers import random_matrix
from test_families import Golden
from tiny_checkpoints import hf_config, random_weights, write_hf
from tmac_py import Model
from tmac_py.benchmark import layer_products, weight_bytes, weight_count
from tmac_py.cli.inspect import collect
from tmac_py.config import ModelConfig
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.llama_forward import LlamaForward
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.lutfile import LutFile
from tmac_py.synthetic import write_synthetic

CONFIG = replace(
    SMALL,
    num_hidden_layers=3,
    tie_word_embeddings=False,
    qk_norm=True,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    norm_topk_prob=True,
    dense_layers=(1,),
)
IDS = np.random.default_rng(1).integers(0, SMALL.vocab_size, 40).astype(np.int32)
ROUTER = "model.layers.{}.mlp.gate.weight"


def config_json(config: ModelConfig, **more: Any) -> dict[str, Any]:
    changes = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    return hf_config(config, **changes, mlp_only_layers=list(config.dense_layers), **more)


def weights_of(config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """Of a size that lets experts matter; tokens choose different ones."""
    weights = random_weights(config)
    return {n: w if w.ndim == 1 else w * (20 if n.endswith("gate.weight") else 3)
            for n, w in weights.items()}  # fmt: skip


def fused(weights: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """All experts of a layer in one tensor."""
    result = {name: w for name, w in weights.items() if ".experts." not in name}
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([weights[f"{prefix}{i}.{name}_proj.weight"] for i in range(6)])
            for name in ("gate", "up", "down")
        )
        result[f"{prefix}gate_up_proj"] = np.concatenate([gate, up], axis=1)
        result[f"{prefix}down_proj"] = down
    return result


def lut(path: Path, config: ModelConfig = CONFIG, **options: Any) -> Path:
    folder = write_hf(path / "m", weights_of(config), config_json(config))
    convert(folder, path / "m.lut", **{"bits": 4, "group_size": 32, **options})
    return path / "m.lut"


def test_both_ways_to_store_experts_give_the_same_file(tmp_path: Path) -> None:
    weights = weights_of(CONFIG)
    for name, tensors in (("apart", weights), ("fused", fused(weights))):
        folder = write_hf(tmp_path / name / "m", tensors, config_json(CONFIG), dtype="BF16")
        convert(folder, tmp_path / f"{name}.lut", bits=4)
    assert (tmp_path / "apart.lut").read_bytes() == (tmp_path / "fused.lut").read_bytes()
    with LutFile.open(tmp_path / "apart.lut") as file:
        assert sorted(file.tensors) == sorted(CONFIG.tensor_shapes())
        assert replace(file.config, bos_token_id=None, eos_token_ids=()) == CONFIG


def test_routers_are_kept_as_floats(tmp_path: Path) -> None:
    with LutFile.open(lut(tmp_path)) as file:
        for layer in (0, 2):
            name = ROUTER.format(layer)
            assert file.tensors[name].kind == "float"
            assert np.array_equal(file.float(name), weights_of(CONFIG)[name])


def assert_same_bits(path: Path, tables: Any) -> None:
    """One token, a few, many in waves of experts; several threads."""
    with Model.load(path, threads=1, tables=tables) as model:
        steps = logits_in_pieces(model, IDS, 1)
        assert np.array_equal(logits_in_pieces(model, IDS, 7), steps)
        assert np.array_equal(logits_in_pieces(model, IDS, 16), steps)
        whole = model.logits(IDS)
        if tables == "exact":
            assert np.array_equal(whole, steps)
        # Where two experts are nearly as likely, other roundings choose another one.
        assert np.median(difference(whole, steps)) < 0.2 * steps.std()
    for threads in (2, 3):
        with Model.load(path, threads=threads, tables=tables) as model:
            assert np.array_equal(logits_in_pieces(model, IDS, 1), steps)
            assert np.array_equal(model.logits(IDS), whole)


@pytest.mark.parametrize("tables", ["int8", "exact", "exact8"])
def test_every_way_through_a_layer_gives_the_same_bits(tmp_path: Path, tables: Any) -> None:
    assert_same_bits(lut(tmp_path), tables)


@pytest.mark.parametrize("tables", ["int8", "exact"])
def test_experts_of_other_bits_do_not_share_inputs(tmp_path: Path, tables: Any) -> None:
    """With int8 tables 1 bit is always looked up, so these experts and others are run apart."""
    assert_same_bits(lut(tmp_path, bits_for=((r"experts\.[02]\.", 1),)), tables)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("tables", ["int8", "exact", "exact8"])
def test_experts_that_are_alike_give_the_bits_of_one(
    tmp_path: Path, tables: Any, group_size: int
) -> None:
    """Wherever the inputs of a token are copied to. Tokens choose by their sign: of each pass about
    half, more than look up tables."""
    config = replace(CONFIG, hidden_size=256, intermediate_size=192, moe_intermediate_size=192,
                     num_experts=2, num_experts_per_tok=1, dense_layers=(),
                     max_position_embeddings=1024)  # fmt: skip
    dense = replace(config, num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0,
                    norm_topk_prob=False)  # fmt: skip
    weights = weights_of(dense)
    weights["model.embed_tokens.weight"][:, 0] = np.resize([20, -20], SMALL.vocab_size)
    router = np.zeros((2, 256), np.float32)
    router[:, 0] = 1, -1
    alike = {
        name: router if name.endswith(".mlp.gate.weight")
        else weights[re.sub(r"experts\.\d\.", "", name)]
        for name in config.tensor_shapes()
    }  # fmt: skip
    logits = []
    ids = np.random.default_rng(2).integers(0, SMALL.vocab_size, 601).astype(np.int32)
    for name, tensors, settings in (
        ("dense", weights, {**config_json(dense), "model_type": "qwen3"}),
        ("alike", alike, config_json(config)),
    ):
        convert(write_hf(tmp_path / name / "m", tensors, settings), tmp_path / f"{name}.lut",
                bits=4, group_size=group_size)  # fmt: skip
        with Model.load(tmp_path / f"{name}.lut", threads=2, tables=tables) as model:
            logits.append(model.logits(ids))
    assert np.array_equal(*logits)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_experts(tmp_path: Path, act_order: bool) -> None:
    """A module each, as GPTQModel writes them; with act-order each has inputs of its own."""
    rng = np.random.default_rng(0)
    dense = weights_of(CONFIG)
    coded: dict[str, NDArray[Any]] = dict(dense)
    for name in [name for name in dense if "_proj" in name]:
        m, k = coded.pop(name).shape
        w = random_matrix(rng, m, k, bits=4, group_size=32, act_order=act_order)
        dense[name] = w.weight()
        module = name.removesuffix(".weight")
        coded.update({f"{module}.{part}": t for part, t in write.gptq(w).items()})
    settings = write.gptq_settings(4, 32, desc_act=act_order)
    config = config_json(CONFIG, quantization_config=settings)
    convert(write_hf(tmp_path / "q", coded, config, dtype=None), tmp_path / "q.lut", head_bits=8)
    folder = write_hf(tmp_path / "f", dense, config_json(CONFIG))
    convert(folder, tmp_path / "f.lut", bits=8, head_bits=8, group_size=16)
    with LutFile.open(tmp_path / "q.lut") as file:
        order = file.order("model.layers.0.mlp.experts.3.up_proj.weight")
        assert (order is not None) == act_order
    with Model.load(tmp_path / "q.lut", tables="exact") as model:
        kept = model.logits(IDS)
    with Model.load(tmp_path / "f.lut", tables="exact") as model:
        again = model.logits(IDS)
    assert np.median(difference(kept, again)) < 0.05 * kept.std()
    assert_same_bits(tmp_path / "q.lut", "exact")


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_experts_are_chosen_from_the_first_on(tmp_path: Path, normalize: bool) -> None:
    """Routers of zeros: the first two of six, with 1/2 each, or 1/6."""

    def logits(n_experts: int, name: str, scale: float) -> NDArray[np.float32]:
        config = replace(CONFIG, num_experts=n_experts, norm_topk_prob=normalize)
        weights = {n: w for n, w in weights_of(CONFIG).items() if n in config.tensor_shapes()}
        for layer in (0, 2):
            weights[ROUTER.format(layer)] = np.zeros((n_experts, SMALL.hidden_size), np.float32)
            for i in range(n_experts):
                weights[f"model.layers.{layer}.mlp.experts.{i}.down_proj.weight"] *= scale
        folder = write_hf(tmp_path / name / "m", weights, config_json(config))
        convert(folder, tmp_path / name / "m.lut", bits=8)
        with Model.load(tmp_path / name / "m.lut", tables="exact") as model:
            return model.logits(IDS)

    many = logits(6, "many", 1)
    two = logits(2, "two", 1 if normalize else 1 / 3)
    assert difference(many, two).max() < (1e-6 if normalize else 0.02) * many.std()


def test_counts_take_the_chosen_experts(tmp_path: Path) -> None:
    with LutFile.open(lut(tmp_path)) as file:
        entries = [entry for entry in file.tensors.values() if entry.kind == "linear"]
        experts = [entry for entry in entries if ".experts." in entry.name]
        assert len(experts) == 2 * 6 * 3
        rest = sum(entry.nbytes for entry in entries if entry not in experts)
        embedding = file.tensors["model.embed_tokens.weight"].nbytes
        assert weight_bytes(file) == rest - embedding + sum(e.nbytes for e in experts) // 3
        weights = sum(entry.shape[0] * entry.shape[1] for entry in experts)
        vocabulary = 2 * SMALL.vocab_size * SMALL.hidden_size
        assert layer_products(file) == weight_count(file) - vocabulary - weights * 2 // 3
        matrices = {
            item["name"]: item for item in collect(file, checked=True, tensors=False)["matrices"]
        }
    assert matrices["mlp.experts.gate_proj"]["count"] == 2 * 6
    assert matrices["mlp.gate_proj"]["count"] == 1


def test_a_synthetic_model_uses_its_experts(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "m.lut", "olmoe-1b-7b/1:2bit")
    with Model.load(tmp_path / "m.lut", threads=2) as model:
        logits = model.logits(IDS)
    assert np.isfinite(logits).all()
    assert (logits.std(axis=1) > 0.1).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_experts": -1}, "num_experts must be an integer from 0"),
        ({"num_experts": 0}, "num_experts_per_tok needs num_experts"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok must be an integer from 1 to 6"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok must be an integer from 1 to 6"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be an integer from 1"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false"),
        ({"dense_layers": [3]}, "dense_layers must be an integer from 0 to 2"),
        ({"full_qk_norm": True}, "qk_norm and full_qk_norm exclude each other"),
        ({"clip_qkv": 0.0}, "clip_qkv must be a positive number"),
        ({"out_norms": True}, "num_experts together with sub_norms, out_norms"),
        ({"biases": ["up_proj"]}, "num_experts together with sub_norms, out_norms"),
    ],
)
def test_files_that_are_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises((ModelFileError, UnsupportedError), match=text):
        ModelConfig.from_dict({**CONFIG.to_dict(), **change})


def test_layers_with_experts_by_period() -> None:
    config = config_json(CONFIG, decoder_sparse_step=2)
    assert ModelConfig.from_hf({**config, "mlp_only_layers": []}).dense_layers == (0, 2)
    dense = ModelConfig.from_hf({**config, "mlp_only_layers": [1]})
    assert (dense.num_experts, dense.dense_layers, dense.qk_norm) == (0, (), True)
    local = {key: value for key, value in config.items() if key != "num_experts"}
    assert ModelConfig.from_hf({**local, "num_local_experts": 6}) == ModelConfig.from_hf(config)


def test_missing_and_misshaped_experts(tmp_path: Path) -> None:
    weights = fused(weights_of(CONFIG))
    name = "model.layers.0.mlp.experts.down_proj"
    weights[name] = weights[name][:5, :, :48]
    path = write_hf(tmp_path / "m", weights, config_json(CONFIG))
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(path)
    text = str(caught.value)
    assert "missing: model.layers.0.mlp.experts.5.down_proj.weight [64, 64]" in text
    assert "experts.0.down_proj.weight [64, 48] instead of [64, 64]" in text


def test_calibration_says_why_not() -> None:
    with pytest.raises(UnsupportedError, match="it cannot see which inputs reach each of them"):
        LlamaForward(CONFIG, 8)


def test_clipped_heads_stay_within(tmp_path: Path) -> None:
    """Values of 1e-6 at most leave nothing of attention: tokens before no longer count."""
    golden = Golden("olmoe")
    with Model.load(golden.convert(tmp_path, clip_qkv=1e-6, attention_bias=True)) as model:
        logits = model.logits(np.array([5, 9, 9], np.int32))
    assert np.abs(logits[1] - logits[2]).max() < 1e-3 * logits.std()


def test_embeddings_do_not_depend_on_other_texts(tmp_path: Path) -> None:
    """Nor on how many of their tokens choose an expert."""
    random = np.random.default_rng(3)
    texts = [random.integers(0, SMALL.vocab_size, n).astype(np.int32) for n in (40, 3, 90, 17, 16)]
    with Model.load(lut(tmp_path), threads=2) as model:
        together = model.embed(texts, pooling="none")
        for text, states in zip(texts, together, strict=True):
            np.testing.assert_array_equal(model.embed(text, pooling="none")[0], states)
