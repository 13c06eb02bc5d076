"""The reader for dense Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from altered_json import alterations
from tiny_checkpoints import TINY, hf_config, random_weights, save_safetensors, write_hf
from tiny_vocab import byte_level_json, sentencepiece_model
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters import huggingface as reader
from tmac_py.converters.checkpoint import FloatMatrix
from tmac_py.errors import ModelFileError, TmacError, UnsupportedError
from tmac_py.lutfile import LutFile

REAL = Path(__file__).resolve().parents[2] / "shared" / "checkpoints" / "smollm2-2layer-hf-bf16"
WEIGHTS = random_weights(TINY)


def folder(path: Path, *, dtype: str = "F32", shards: int = 1, **changes: Any) -> Path:
    return write_hf(path, WEIGHTS, hf_config(TINY, **changes), dtype=dtype, shards=shards)


def stored_as(w: Any, dtype: str) -> Any:
    """What is left of float32 weights in a dtype."""
    if dtype == "BF16":
        return (w.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return w.astype(np.float16).astype(np.float32) if dtype == "F16" else w


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_arrive_exactly(tmp_path: Path, dtype: str, shards: int) -> None:
    path = folder(tmp_path / "m", dtype=dtype, shards=shards)
    assert reader.detect(path)
    checkpoint = reader.read(path)
    assert checkpoint.config == dataclasses.replace(TINY, bos_token_id=1, eos_token_ids=(2,))
    assert [t.name for t in checkpoint.tensors] == list(WEIGHTS)
    for tensor in checkpoint.tensors:
        got = tensor.load()
        want = stored_as(WEIGHTS[tensor.name], dtype)
        if isinstance(got, FloatMatrix):
            assert tensor.dense
            assert np.array_equal(got[slice(0, None)], want)
            assert np.array_equal(got[slice(3, 7)], want[3:7])
        else:
            assert isinstance(got, np.ndarray)
            assert got.dtype == np.float32
            assert np.array_equal(got, want)


def test_a_folder_becomes_a_lut(tmp_path: Path) -> None:
    one, many = folder(tmp_path / "a" / "m"), folder(tmp_path / "b" / "m", shards=4)
    convert(one, tmp_path / "one.lut", bits=2, group_size=-1, quant="rtn", asym=False)
    convert(many, tmp_path / "many.lut", bits=2, group_size=-1, quant="rtn", asym=False)
    assert (tmp_path / "one.lut").read_bytes() == (tmp_path / "many.lut").read_bytes()
    with LutFile.open(tmp_path / "one.lut") as file:
        _, spec = file.linear("model.layers.1.mlp.down_proj.weight")
        assert (spec.m, spec.k, spec.bits, spec.group_size) == (256, 512, 2, 512)
        assert (spec.offset_kind, spec.zero) == ("none", 2.0)
        assert file.linear("lm_head.weight")[1].bits == 6
        assert np.array_equal(file.float("model.norm.weight"), WEIGHTS["model.norm.weight"])


def test_the_defaults(tmp_path: Path) -> None:
    convert(folder(tmp_path / "m"), tmp_path / "m.lut")
    with LutFile.open(tmp_path / "m.lut") as file:
        linear = file.linear("model.layers.0.self_attn.q_proj.weight")[1]
        assert (linear.bits, linear.group_size, linear.offset_kind) == (4, 32, "offset")
        head = file.linear("model.embed_tokens.weight")[1]
        assert (head.bits, head.group_size, head.offset_kind) == (6, 32, "offset")


def test_tokenizer_files(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    assert "no tokenizer" in reader.read(path).warnings[0]
    assert reader.read(path).tokenizer == {}
    (path / "tokenizer.json").write_bytes(byte_level_json(bos=True))
    settings: dict[str, Any] = {
        "bos_token": {"content": "<|im_start|>"},
        "eos_token": "<|im_end|>",
        "model_max_length": 10**30,
        "added_tokens_decoder": {"40": {"content": "<pad>"}},
        "chat_template": [
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "yes"},
        ],
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = reader.read(path)
    assert checkpoint.warnings == ()
    assert checkpoint.tokenizer["chat_template.jinja"] == b"yes"
    assert checkpoint.tokenizer["tokenizer.json"] == byte_level_json(bos=True)
    kept = json.loads(checkpoint.tokenizer["tokenizer_config.json"])
    assert kept == {key: settings[key] for key in ("bos_token", "eos_token")}

    (path / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    assert reader.read(path).tokenizer["chat_template.jinja"] == b"of a processor"
    (path / "chat_template.jinja").write_text("file")
    assert reader.read(path).tokenizer["chat_template.jinja"] == b"file"

    (path / "tokenizer.json").unlink()
    (path / "tokenizer.model").write_bytes(sentencepiece_model())
    checkpoint = reader.read(path)
    assert checkpoint.tokenizer["tokenizer.model"] == sentencepiece_model()
    kept = json.loads(checkpoint.tokenizer["tokenizer_config.json"])
    assert kept["added_tokens_decoder"] == {"40": {"content": "<pad>"}}


def test_special_tokens_of_older_folders(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    (path / "tokenizer.json").write_bytes(byte_level_json())
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    named = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|end|>", "sep_token": "x"}
    (path / "special_tokens_map.json").write_text(json.dumps(named))
    kept = json.loads(reader.read(path).tokenizer["tokenizer_config.json"])
    assert kept == {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("vocabulary", "settings", "eos", "expected"),
    [
        ("tokenizer.json", {}, 7, (7, 2, 0)),  # what the model says, <|im_end|>, <|end|>
        ("tokenizer.json", {}, [0, 2], (0, 2)),
        ("tokenizer.json", {"eos_token": "<|im_start|>"}, None, (1, 2, 0)),
        ("tokenizer.json", {"eos_token": {"content": "<|im_end|>"}}, 0, (0, 2)),
        ("tokenizer.json", {"eos_token": "<none such>"}, None, (2, 0)),
        ("tokenizer.model", {"eos_token": "</s>"}, None, (2,)),
        (
            "tokenizer.model",
            {"added_tokens_decoder": {"400": {"content": "<|eot_id|>"}}},
            2,
            (2, 400),
        ),
        (None, {"eos_token": "</s>"}, 7, (7,)),
    ],
)
def test_end_tokens(
    tmp_path: Path,
    vocabulary: str | None,
    settings: dict[str, Any],
    eos: int | list[int] | None,
    expected: tuple[int, ...],
) -> None:
    path = folder(tmp_path / "m", eos_token_id=eos)
    if vocabulary is not None:
        json_file = vocabulary == "tokenizer.json"
        (path / vocabulary).write_bytes(byte_level_json() if json_file else sentencepiece_model())
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert reader.read(path).config.eos_token_ids == expected


def test_what_is_stored_but_not_used(tmp_path: Path) -> None:
    weights = {**WEIGHTS, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32, np.float32)}
    path = write_hf(tmp_path / "m", weights, hf_config(TINY, tie_word_embeddings=True))
    names = [t.name for t in reader.read(path).tensors]
    assert "lm_head.weight" not in names
    assert len(names) == len(WEIGHTS) - 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"quantization_config": {"quant_method": "aqlm"}}, "quant_method 'aqlm' is not"),
        ({"quantization_config": {"bits": 4}}, "quant_method must name the method"),
        ({"quantization_config": [4]}, "quantization_config must be an object"),
        ({"model_type": "gpt_neox"}, "gpt_neox"),
        ({"attention_bias": True}, r"missing: model\.layers\.0\.self_attn\.q_proj\.bias \[256\]"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_configurations_are_refused(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    path = folder(tmp_path / "m", **changes)
    with pytest.raises(TmacError, match=text) as caught:
        convert(path, tmp_path / "m.lut")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "m.lut").exists()


def test_errors_name_a_folder_of_one_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = folder(Path("c"), model_type="gpt_neox")
    with pytest.raises(UnsupportedError, match=r"^c: config\.json: .*gpt_neox"):
        reader.read(path)


def test_wrong_tensors_are_reported_together(tmp_path: Path) -> None:
    weights = dict(WEIGHTS)
    del weights["model.layers.1.mlp.gate_proj.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = np.ones(256, np.float32)
    weights["model.norm.weight"] = np.ones(128, np.float32)
    path = write_hf(tmp_path / "m", weights, hf_config(TINY))
    with pytest.raises(ModelFileError) as caught:
        reader.read(path)
    text = str(caught.value)
    assert "missing: model.layers.1.mlp.gate_proj.weight [512, 256]" in text
    assert "not expected: model.layers.0.self_attn.q_proj.bias [256]" in text
    assert "model.norm.weight [128] instead of [256]" in text


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    path = write_hf(tmp_path / "m", {}, hf_config(TINY))
    with pytest.raises(ModelFileError, match=rf"and {len(WEIGHTS) - 8} more"):
        reader.read(path)


def test_bad_weights_name_the_tensor(tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    broken = WEIGHTS[name].copy()
    broken[5, 7] = np.nan
    path = write_hf(tmp_path / "m", {**WEIGHTS, name: broken}, hf_config(TINY))
    with pytest.raises(ModelFileError, match=rf"{name}.*not finite"):
        convert(path, tmp_path / "m.lut")
    assert list(tmp_path.iterdir()) == [path]
    path = folder(tmp_path / "n", dtype="F64")
    with pytest.raises(UnsupportedError, match=r"model\.embed_tokens\.weight F64"):
        reader.read(path)


def test_shards_that_are_missing_or_mixed_up(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ModelFileError, match=r"shards are missing: model-00002"):
        reader.read(path)
    shard.write_bytes(content)
    index = path / "model.safetensors.index.json"
    for weight_map in ({"a": "../../secret.safetensors"}, {"a": 3}, [1], None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelFileError, match="weight_map"):
            reader.read(path)


def test_a_cut_or_altered_file_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    file = path / "model.safetensors"
    whole = file.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    for cut in [0, 1, 7, 8, 9, 100, length - 1, length, length + 1, len(whole) - 1]:
        file.write_bytes(whole[:cut])
        with pytest.raises(ModelFileError) as caught:
            reader.read(path)
        assert "\n" not in str(caught.value)
    rng = np.random.default_rng(9)
    refused = []
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(0, length, 3):
            data[at] = int(rng.integers(256))
        file.write_bytes(data)
        try:
            reader.read(path)
        except TmacError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert not any("\n" in text for text in refused)


def short_tokenizer_json() -> Any:
    """A tokenizer.json with each kind of part, and few of each."""
    state = json.loads(byte_level_json(bos=True))
    state["added_tokens"] = state["added_tokens"][:1]
    state["model"].update(vocab={"<|end|>": 0, "<|im_start|>": 1, "a": 2, "b": 3, "ab": 4})
    state["model"].update(merges=[["a", "b"]])
    return state


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", hf_config(TINY, rope_scaling={"rope_type": "linear", "factor": 2.0})),
        ("generation_config.json", {"eos_token_id": [2, 3], "top_p": 0.9, "do_sample": True}),
        ("tokenizer.json", short_tokenizer_json()),
        (
            "tokenizer_config.json",
            {
                "add_bos_token": True,
                "bos_token": {"content": "<|im_start|>"},
                "eos_token": "<|im_end|>",
                "chat_template": [{"name": "default", "template": "x"}],
            },
        ),
        ("special_tokens_map.json", {"bos_token": {"content": "<|im_start|>"}}),
        ("chat_template.json", {"chat_template": "x"}),
        ("model.safetensors.index.json", None),
    ],
)
def test_json_of_any_other_form_is_read_or_refused(tmp_path: Path, name: str, content: Any) -> None:
    path = folder(tmp_path / "m", shards=2)
    (path / "tokenizer.json").write_bytes(byte_level_json())
    if content is None:
        content = json.loads((path / name).read_text())
        content["weight_map"] = dict(list(content["weight_map"].items())[:2])
    refused = []
    texts = [b"", b"{", b"\xff{}", b"[" * 100_000, b"1" * 5000]
    for text in (*texts, *(json.dumps(value).encode() for value in alterations(content))):
        (path / name).write_bytes(text)
        try:
            reader.read(path)
        except TmacError as error:
            refused.append(str(error))
    assert len(refused) > len(texts)
    assert all(text.startswith(str(path)) and "\n" not in text for text in refused)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"chat_template": ["x"]}, r"chat_template must be a text, or a list"),
        ({"chat_template": [{"name": "default", "template": 1}]}, r"chat_template must be a text"),
        ({"added_tokens_decoder": ["x"]}, r"added_tokens_decoder is malformed"),
    ],
)
def test_tokenizer_settings_that_are_refused(tmp_path: Path, content: Any, text: str) -> None:
    path = folder(tmp_path / "m")
    (path / "tokenizer.model").write_bytes(sentencepiece_model())
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelFileError, match=text):
        reader.read(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_vocabulary_is_refused(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path / "m")
    (path / name).write_bytes(b"pieces")
    with pytest.raises(ModelFileError, match=rf"{path}.*{name} cannot be read"):
        reader.read(path)


def test_weights_in_one_file_of_any_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    (path / "model.safetensors").rename(path / "gptq_model-4bit-128g.safetensors")
    assert [tensor.name for tensor in reader.read(path).tensors] == list(WEIGHTS)
    (path / "other.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors nor"):
        reader.read(path)


def test_folders_without_weights(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"neither model\.safetensors nor"):
        reader.read(path)
    (path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin is a pickle"):
        reader.read(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match="not a JSON file"):
        reader.read(path)
    (path / "config.json").unlink()
    with pytest.raises(UnsupportedError, match=r"without config\.json"):
        open_checkpoint(path)


def test_the_writer_of_these_tests_writes_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    save_safetensors(tmp_path / "x.safetensors", WEIGHTS, "F16")
    read = load_file(tmp_path / "x.safetensors")
    assert {n: w.tolist() for n, w in read.items()} == {
        n: w.astype(np.float16).tolist() for n, w in WEIGHTS.items()
    }


@pytest.mark.skipif(
    not REAL.is_dir(), reason="the sample checkpoints are not beside the repository"
)
def test_a_real_checkpoint(tmp_path: Path) -> None:
    checkpoint = reader.read(REAL)
    assert checkpoint.config.rope_theta == 100000.0
    assert (checkpoint.config.num_hidden_layers, checkpoint.config.vocab_size) == (2, 4096)
    reference = np.load(REAL / "reference.npz")
    by_name = {t.name: t for t in checkpoint.tensors}
    for key, name, rows in (
        ("q_proj_rows0_16", "model.layers.0.self_attn.q_proj.weight", slice(0, 16)),
        ("down_proj_rows0_16", "model.layers.0.mlp.down_proj.weight", slice(0, 16)),
        ("last_gate_proj_rows100_116", "model.layers.1.mlp.gate_proj.weight", slice(100, 116)),
    ):
        matrix = by_name[name].load()
        assert isinstance(matrix, FloatMatrix)
        assert np.array_equal(matrix[rows], reference[key])
    convert(REAL, tmp_path / "m.lut")
    with LutFile.open(tmp_path / "m.lut") as file:
        assert file.config == checkpoint.config
