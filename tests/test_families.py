"""Every decoder family against transformers: tiny models with every feature of the family on.

tests/golden/family-*.npz hold folders as transformers saves them and the logits it computes
(make_families.py). 8 bits hold their weights exactly, so with exact tables all differences are
those of the documented roundings, whose size the files know (as in test_transformers_parity.py).
BitNet is in test_bitnet.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from parity import assert_top1_agrees, difference, logits_in_pieces
from tmac_py import Model
from tmac_py.config import ModelConfig
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.llama_forward import LlamaForward
from tmac_py.errors import ModelFileError, TmacError, UnsupportedError
from tmac_py.families import FAMILIES
from tmac_py.lutfile import LutFile

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("llama", "qwen2", "qwen3", "qwen3_moe", "olmoe", "smollm3", "phi3", "gemma2", "gemma3")
WINDOW = 7


class Golden:
    """One golden file: folder and arrays."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"family-{name}.npz") as arrays:
            everything = dict(arrays)
        self.files = {n: a.tobytes() for n, a in everything.items() if "." in n}
        self.config: dict[str, Any] = json.loads(self.files["config.json"])
        self.ids: NDArray[np.int32] = everything["ids"]
        self.logits: NDArray[np.float32] = everything["logits"]
        self.begin: NDArray[np.float32] | None = everything.get("logits_begin")
        self.group_size = int(everything["group_size"])
        self.bound = 2 * float(everything["exact_error"])
        """Twice the error that the same roundings cause within transformers: see
        test_transformers_parity.py."""

    def folder(self, path: Path, **changes: Any) -> Path:
        """The folder as transformers saved it, with ``changes`` to its config.json."""
        path.mkdir(parents=True)
        for name, content in self.files.items():
            (path / name).write_bytes(content)
        (path / "config.json").write_text(json.dumps({**self.config, **changes}))
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


def test_every_family_has_a_golden_model() -> None:
    tested = {Golden(name).config["model_type"] for name in NAMES}
    elsewhere = {"mistral", "bitnet"}  # test_transformers_parity.py, test_bitnet.py
    assert tested | elsewhere == set(FAMILIES)


def test_the_golden_models_switch_everything_on() -> None:
    """Every optional step of the graph, and every one of them off somewhere."""
    configs = [ModelConfig.from_hf(Golden(name).config) for name in NAMES]
    plain = ModelConfig.from_hf({**Golden("llama").config, "attention_bias": 0, "mlp_bias": False})
    used = {name for config in configs for name in config.to_dict()} - set(plain.to_dict())
    assert used == {
        "out_norms",
        "qk_norm",
        "biases",
        "partial_rotary_factor",
        "full_attention_layers",
        "layers_without_rope",
        "rope_local_base_freq",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "embedding_scale",
        "full_qk_norm",
        "clip_qkv",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "dense_layers",
    }
    assert {config.hidden_act for config in configs} == {"silu", "gelu_pytorch_tanh"}
    assert {len(config.biases) for config in configs} == {0, 3, 4, 7}
    windows = {tuple(c.window_of(i) for i in range(3)) for c in configs}
    assert {(0, 0, 0), (0, 0, WINDOW), (0, WINDOW, 0), (0, WINDOW, WINDOW)} <= windows
    assert {(WINDOW, 0, WINDOW), (WINDOW, WINDOW, WINDOW)} <= windows


def test_logits_are_those_of_transformers(golden: Golden, lut: Path) -> None:
    with Model.load(lut, threads=2, tables="exact") as model:
        ours = model.logits(golden.ids)
        assert difference(ours, golden.logits).max() < golden.bound
        if golden.begin is not None:
            begin = model.logits(golden.ids[: len(golden.begin)])
            assert difference(begin, golden.begin).max() < golden.bound
            changed = golden.logits[: len(begin)]
            assert difference(golden.begin, changed).max() > 10 * golden.bound
    assert golden.bound < 0.02 * golden.logits.std()
    assert_top1_agrees(ours, golden.logits, golden.bound, decided=0.8)


@pytest.mark.parametrize("tables", ["exact", "int8", "exact8"])
def test_prefill_equals_single_steps_bit_for_bit(golden: Golden, lut: Path, tables: Any) -> None:
    """With a cache longer than the window, and for one thread as for two."""
    with Model.load(lut, threads=2, tables=tables) as model:
        ids = golden.ids
        assert model.new_cache().n_ctx == 64 > len(ids) > WINDOW
        steps = logits_in_pieces(model, ids, 1)
        assert np.array_equal(logits_in_pieces(model, ids, 16), steps)
        if tables == "exact":
            assert np.array_equal(logits_in_pieces(model, ids, len(ids)), steps)
    with Model.load(lut, threads=1, tables=tables) as model:
        assert np.array_equal(logits_in_pieces(model, ids, 1), steps)


def test_the_file_says_what_the_config_does(golden: Golden, lut: Path) -> None:
    config = ModelConfig.from_hf(golden.config)
    with LutFile.open(lut) as file:
        assert file.config == config
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_equal_folders_give_equal_files(golden: Golden, tmp_path: Path) -> None:
    a, b = golden.convert(tmp_path / "a"), golden.convert(tmp_path / "b")
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2", {"max_window_layers": 2, "layer_types": None}),
        ("qwen2", {"sliding_window": WINDOW + 1}),
        ("qwen2", {"use_sliding_window": False, "layer_types": None}),
        ("qwen3", {"layer_types": ["full_attention"] * 3}),
        ("qwen3_moe", {"num_experts_per_tok": 2}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"use_sliding_window": False}),
        ("olmoe", {"num_experts_per_tok": 1}),
        ("olmoe", {"norm_topk_prob": True}),
        ("olmoe", {"clip_qkv": None}),
        ("olmoe", {"clip_qkv": 1.4}),
        ("smollm3", {"no_rope_layers": [1, 1, 0]}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 3}),
        ("smollm3", {"use_sliding_window": False}),
        ("phi3", {"sliding_window": None}),
        ("phi3", {"original_max_position_embeddings": 25}),
        ("phi3", {"original_max_position_embeddings": 64}),
        ("gemma2", {"attn_logit_softcapping": 2.1}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma2", {"sliding_window": WINDOW + 1}),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("gemma2", {"hidden_activation": "silu"}),
        ("gemma2", {"dtype": "float16"}),
        ("gemma3", {"query_pre_attn_scalar": 16}),
        ("gemma3", {"final_logit_softcapping": 7.0}),
        ("gemma3", {"layer_types": ["sliding_attention"] * 3}),
    ],
)
def test_every_setting_shows(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """The comparison would notice a setting that is ignored or misread."""
    golden = Golden(name)
    lut = golden.convert(tmp_path, **changes)
    with Model.load(lut, threads=2, tables="exact") as model:
        off = difference(model.logits(golden.ids), golden.logits).max()
    assert off > (1.2 if "dtype" in changes else 5) * golden.bound


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_both_ropes_of_gemma_3_show(tmp_path: Path, kind: str) -> None:
    golden = Golden("gemma3")
    ropes = golden.config["rope_parameters"]
    changed = {**ropes, kind: {**ropes[kind], "rope_theta": 1.5 * ropes[kind]["rope_theta"]}}
    with Model.load(golden.convert(tmp_path, rope_parameters=changed), tables="exact") as model:
        assert difference(model.logits(golden.ids), golden.logits).max() > 5 * golden.bound


def test_keys_of_older_transformers() -> None:
    """Gemma 3 as transformers 4 writes it, Phi-3 with its first name of longrope."""
    config = Golden("gemma3").config
    ropes = config["rope_parameters"]
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    old |= {"rope_theta": ropes["full_attention"]["rope_theta"], "torch_dtype": config["dtype"]}
    old |= {"rope_local_base_freq": 100.0, "rope_scaling": {"factor": 4.0, "rope_type": "linear"}}
    old |= {"sliding_window_pattern": 2}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(config)
    config = Golden("phi3").config
    rope = dict(config["rope_parameters"])
    theta, part = rope.pop("rope_theta"), rope.pop("partial_rotary_factor")
    rope.pop("rope_type")
    rope.pop("factor", None)
    rope.pop("original_max_position_embeddings", None)
    old = {k: v for k, v in config.items() if k != "rope_parameters"}
    old |= {"rope_theta": theta, "partial_rotary_factor": part}
    for kind in ("longrope", "su", "yarn"):
        old["rope_scaling"] = {**rope, "type": kind}
        assert ModelConfig.from_hf(old) == ModelConfig.from_hf(config)


def test_long_factors_are_chosen_by_the_size_of_the_cache(tmp_path: Path) -> None:
    golden = Golden("phi3")
    original = golden.config["original_max_position_embeddings"]
    with Model.load(golden.convert(tmp_path), tables="exact") as model:
        ids = golden.ids[:original]
        short = model.forward(ids, model.new_cache(original), "all")
        long = model.forward(ids, model.new_cache(original + 1), "all")
        kept = model.new_cache(original)
        model.forward(ids[:-1], kept)
        larger = model.new_cache(2 * original)
        larger.restore(kept.state())
        forked = kept.fork(2 * original)
        last = [model.forward(ids[-1:], cache) for cache in (kept, forked, larger)]
        larger.truncate(0)
        again = model.forward(ids, larger, "all")
    assert np.array_equal(short[0], long[0])  # position 0 does not turn
    assert difference(short, long).max() > 10 * golden.bound
    assert all(np.array_equal(one, short[-1]) for one in last)  # as the keys that are there
    assert np.array_equal(again, long)


def test_fused_modules_are_split_by_rows(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(Golden("phi3").folder(tmp_path / "m"))
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors}
    prefix = "model.layers.1."
    rows = [
        tensors[f"{prefix}self_attn.{name}_proj.weight"].load()[slice(0, None)]  # type: ignore[index]
        for name in "qkv"
    ]
    assert [w.shape for w in rows] == [(64, 64), (32, 64), (32, 64)]
    again = tensors[f"{prefix}self_attn.k_proj.weight"].load()
    assert np.array_equal(again[slice(3, 9)], rows[1][3:9])  # type: ignore[index]
    assert len(np.unique(np.concatenate(rows), axis=0)) == 128


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 3}, "layer_types must list 3 of full_"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must list 3 of full_attent"),
        ("gemma2", {"layer_types": 3}, "layer_types must list 3 of full_attention, sliding_att"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_act 'gelu' is not supported"),
        ("gemma2", {"attn_logit_softcapping": "x"}, "attn_logit_softcapping must be a number"),
        ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping must be a positive"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a positive num"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must list 3 numbers"),
        ("phi3", {"original_max_position_embeddings": 1}, "original_max_position_embeddings must"),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0},
          "sliding_attention": {"rope_type": "linear", "factor": 2.0}}}, "of sliding_attention is"),
        ("llama", {"mlp_bias": False}, r"not expected: model\.layers\.0\.mlp\..*bias"),
        ("qwen2", {"model_type": "llama"}, r"not expected: .*bias"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, name: str, changes: dict[str, Any], text: str) -> None:
    path = Golden(name).folder(tmp_path / "m", **changes)
    with pytest.raises(TmacError, match=text) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_rope_settings_that_are_refused() -> None:
    golden = Golden("phi3")
    rope = golden.config["rope_parameters"]
    for change, text in (
        ({"short_factor": [1.0]}, "short_factor must hold 6 numbers, found 1"),
        ({"long_factor": ["x"] * 6}, "long_factor must be positive"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 gives 24 of 16"),
        ({"partial_rotary_factor": 0.45}, "gives 7 of 16 dimensions; an even number"),
    ):
        with pytest.raises(ModelFileError, match=text):
            ModelConfig.from_hf({**golden.config, "rope_parameters": {**rope, **change}})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"biases": "q_proj"}, "biases must be a list of names"),
        ({"biases": ["q"]}, "biases: 'q' is not a projection"),
        ({"layers_without_rope": [3]}, "layers_without_rope must be an integer from 0 to 2"),
        ({"full_attention_layers": [-1]}, "full_attention_layers must be an integer from 0 to 2"),
        ({"embedding_scale": 0.0}, "embedding_scale must be a positive number"),
        ({"final_logit_softcapping": "x"}, "final_logit_softcapping must be a number"),
        ({"qk_norm": 1}, "qk_norm must be true or false"),
    ],
)
def test_files_that_are_refused(change: dict[str, Any], text: str) -> None:
    values = ModelConfig.from_hf(Golden("llama").config).to_dict()
    with pytest.raises(ModelFileError, match=text):
        ModelConfig.from_dict({**values, **change})


@pytest.mark.parametrize("name", NAMES)
def test_calibration_knows_plain_layers_only(name: str) -> None:
    with pytest.raises(UnsupportedError, match="calibration does not know models with"):
        LlamaForward(ModelConfig.from_hf(Golden(name).config), 8)
