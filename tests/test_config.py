"""ModelConfig: reading config.json, refusing what cannot run, RoPE against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tmac_py.config import ModelConfig
from tmac_py.errors import ModelFileError, TmacError, UnsupportedError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rope.json").read_text())

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
}


DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 4096,
}
HUGE = 10**400


def hf(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**LLAMA, **changes})


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_rope_equals_transformers(case: dict[str, Any]) -> None:
    inv_freq, attention_scale = ModelConfig.from_hf(case["config"]).rope()
    assert inv_freq.dtype == np.float32
    # transformers computes in float32: its own rounding is a few parts in a million
    np.testing.assert_allclose(inv_freq, case["inv_freq"], rtol=4e-6)
    assert attention_scale == pytest.approx(case["attention_scale"], rel=1e-7)


def test_reads_llama() -> None:
    config = hf()
    assert (config.head_dim, config.num_key_value_heads) == (64, 3)
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.rope_theta == 100000.0
    assert config.rope_scaling is None
    assert config.tie_word_embeddings
    assert config.sliding_window == 0


def test_reads_transformers_5_rope_parameters() -> None:
    values = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    config = ModelConfig.from_hf({**values, "rope_parameters": parameters})
    assert config.rope_theta == 5000.0
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_defaults_are_those_of_transformers() -> None:
    optional = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    config = ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k not in optional})
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.rms_norm_eps == 1e-6
    assert config.rope_theta == 10000.0
    assert not config.tie_word_embeddings
    assert hf(head_dim=None).head_dim == 64
    assert hf(head_dim=32).head_dim == 32


@pytest.mark.parametrize(("given", "expected"), [({}, 4096), ({"sliding_window": None}, 0)])
def test_sliding_window_is_mistrals(given: dict[str, Any], expected: int) -> None:
    assert hf(model_type="mistral", num_key_value_heads=3, **given).sliding_window == expected
    assert hf(sliding_window=512).sliding_window == 0  # transformers' llama has none


def test_generation_config_decides_the_end_tokens() -> None:
    config = ModelConfig.from_hf(LLAMA, {"eos_token_id": [2, 7]})
    assert config.eos_token_ids == (2, 7)
    assert ModelConfig.from_hf(LLAMA, {"eos_token_id": None}).eos_token_ids == (2,)
    assert ModelConfig.from_hf(LLAMA, {}).eos_token_ids == (2,)
    assert hf(eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported (llama, mistral, qwen2"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"architectures": 5}, "architecture 5 is not supported"),
        ({"architectures": "BertModel"}, "architecture BertModel is not supported"),
        ({"rope_scaling": {"rope_type": []}}, "rope type [] is not supported"),
        (
            {"rope_scaling": {**DYNAMIC, "original_max_position_embeddings": 4096}},
            "max_position_embeddings (8192) is larger than original_max_position_embeddings (4096)",
        ),
        (
            {"rope_scaling": DYNAMIC, "original_max_position_embeddings": 4096},
            "'dynamic' is supported within the original context only",
        ),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, "'proportional'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "sections": [1]}}, "sections"),
    ],
)
def test_refuses_what_it_cannot_run(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        hf(**changes)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 2}, "multiple of"),
        ({"head_dim": 63}, "even"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"bos_token_id": 4096}, "bos_token_id"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor must be positive"),
        ({"rope_scaling": {"rope_type": "factors", "factors": [1.0]}}, "must hold 32 numbers"),
        ({"rope_scaling": "linear"}, "rope_scaling must be null or an object, found 'linear'"),
        ({"rope_scaling": ["a"]}, "must be null or an object"),
        ({"rope_theta": HUGE}, "rope_theta must be a number"),
        ({"hidden_size": HUGE}, "hidden_size must be an integer"),
        ({"max_position_embeddings": HUGE}, "max_position_embeddings must be an integer"),
        ({"eos_token_id": HUGE}, "eos_token_ids must be an integer"),
        ({"head_dim": 2**20}, "head_dim must be an integer from 1 to 65536"),
        ({"rope_scaling": {"type": "linear", "factor": HUGE}}, "factor must be positive"),
        ({"rope_scaling": {**DYNAMIC, "original_max_position_embeddings": "x"}}, "found 'x'"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "give no finite frequencies"),
        ({"rope_scaling": {**YARN, "beta_fast": 1e-320, "factor": 1e300}}, "no finite frequencies"),
        ({"rope_theta": 1e-308}, "give no finite frequencies"),
    ],
)
def test_refuses_values_without_sense(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelFileError, match=text) as caught:
        hf(**changes)
    assert len(str(caught.value)) < 250


def test_dynamic_is_plain_within_the_original_context() -> None:
    plain, _ = hf().rope()
    for original in (8192, 16384):
        config = hf(rope_scaling={**DYNAMIC, "original_max_position_embeddings": original})
        assert config.rope_scaling == DYNAMIC
        assert np.array_equal(config.rope()[0], plain)


def test_from_dict_refuses_a_rope_type_that_is_no_text() -> None:
    with pytest.raises(UnsupportedError, match="rope type"):
        ModelConfig.from_dict({**hf().to_dict(), "rope_scaling": {"rope_type": []}})
    with pytest.raises(ModelFileError, match="rope_theta must be a number"):
        ModelConfig.from_dict({**hf().to_dict(), "rope_theta": HUGE})


def test_factors_divide_the_frequencies() -> None:
    plain, _ = hf().rope()
    factors = [1.0 + index for index in range(32)]
    scaled, scale = hf(rope_scaling={"rope_type": "factors", "factors": factors}).rope()
    np.testing.assert_allclose(scaled, plain / np.array(factors), rtol=1e-6)
    assert scale == 1.0


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_round_trip_through_json(case: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(case["config"])
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", sorted(hf().to_dict()))
def test_from_dict_is_strict(name: str) -> None:
    values = hf().to_dict()
    without = {key: value for key, value in values.items() if key != name}
    with pytest.raises(ModelFileError, match=f"missing key {name}"):
        ModelConfig.from_dict(without)
    for wrong in ([], "x", 1.5) if name != "eos_token_ids" else ("x", [1.5], {}):
        if isinstance(wrong, float) and isinstance(values[name], float):
            continue
        with pytest.raises(TmacError, match=name):
            ModelConfig.from_dict({**values, name: wrong})
    with pytest.raises(ModelFileError, match="unknown key surprise"):
        ModelConfig.from_dict({**values, "surprise": 1})


def test_bitnet_settings() -> None:
    plain, packed = hf(), hf(quantization_config={"quant_method": "bitnet"})
    assert (plain.activation_bits, plain.default_tables) == (None, "int8")
    assert (packed.activation_bits, packed.default_tables) == (8, "exact8")
    assert packed.to_dict() == {**plain.to_dict(), "activation_bits": 8}
    assert ModelConfig.from_dict(packed.to_dict()) == packed
    for wrong in (4, "x", [], True, 8.0):
        with pytest.raises(ModelFileError, match="activation_bits must be 8 or absent"):
            ModelConfig.from_dict({**plain.to_dict(), "activation_bits": wrong})
    with pytest.raises(ModelFileError, match="sub_norms must be true or false"):
        ModelConfig.from_dict({**plain.to_dict(), "sub_norms": 1})


def test_sub_norms() -> None:
    config = hf(model_type="bitnet", hidden_act="relu2", architectures=["BitNetForCausalLM"])
    norms = {n: s for n, s in config.tensor_shapes().items() if "sub_norm" in n}
    assert len(norms) == 2 * config.num_hidden_layers
    assert norms["model.layers.1.self_attn.attn_sub_norm.weight"] == (576,)
    assert norms["model.layers.0.mlp.ffn_sub_norm.weight"] == (1536,)
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_what_transformers_takes_for_absent_keys_of_bitnet() -> None:
    keys = ("rope_theta", "rms_norm_eps", "num_key_value_heads", "hidden_act", "rope_scaling")
    given = {k: v for k, v in LLAMA.items() if k not in keys}
    sizes = {"hidden_size": 640, "num_attention_heads": 10}
    config = ModelConfig.from_hf({**given, **sizes, "model_type": "bitnet"})
    assert (config.rope_theta, config.rms_norm_eps) == (500000.0, 1e-5)
    assert (config.num_key_value_heads, config.hidden_act) == (5, "relu2")


def test_tensor_shapes() -> None:
    tied, separate = hf().tensor_shapes(), hf(tie_word_embeddings=False).tensor_shapes()
    assert len(tied) == 2 + 2 * 9
    assert tied["model.layers.1.self_attn.k_proj.weight"] == (192, 576)
    assert tied["model.layers.0.mlp.down_proj.weight"] == (576, 1536)
    assert tied["model.norm.weight"] == (576,)
    assert set(separate) - set(tied) == {"lm_head.weight"}
