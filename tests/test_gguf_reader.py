"""The GGUF reader: every type, row orders, configurations, and files it must refuse."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_checkpoints import (
    TINY,
    encode,
    gguf_name,
    gguf_tensors,
    random_weights,
    set_type,
    to_gguf_order,
    write_gguf,
)
from tmac_py import _core
from tmac_py.config import ModelConfig
from tmac_py.converters import QuantOptions, convert, convert_checkpoint
from tmac_py.converters import gguf as reader
from tmac_py.converters.checkpoint import Checkpoint
from tmac_py.converters.gguf_container import GGUFFile, _StrictReader
from tmac_py.converters.gguf_types import BLOCK_TYPES, decode_tensor
from tmac_py.errors import ModelFileError, TmacError, UnsupportedError
from tmac_py.lutfile import LutFile
from tmac_py.quant import QuantTensor, quantize_rtn


def tiny(path: Path, kind: str = "Q8_0", **metadata: Any) -> Path:
    """A tiny GGUF file; ``metadata`` keys have _ for the dots after "llama"."""
    return write_gguf(path, TINY, gguf_tensors(random_weights(TINY), TINY, kind), metadata)


def loaded(checkpoint: Checkpoint, name: str) -> Any:
    return next(t for t in checkpoint.tensors if t.name == name).load()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q3_K", "Q5_K", "F32", "F16", "BF16"])
def test_a_file_comes_back_in_hugging_face_order(tmp_path: Path, kind: str) -> None:
    weights = random_weights(TINY)
    path = tiny(tmp_path / "m.gguf", kind)
    assert reader.detect(path)
    checkpoint = reader.read(path)
    assert checkpoint.config == dataclasses.replace(TINY, tie_word_embeddings=False)
    assert checkpoint.n_elements == sum(w.size for w in weights.values())
    assert [t.name for t in checkpoint.tensors] == list(weights)
    for seed, (name, w) in enumerate(weights.items()):
        got = loaded(checkpoint, name)
        if w.ndim == 1:
            assert got.dtype == np.float32
            assert np.array_equal(got, w)
            continue
        raw = encode(to_gguf_order(name, w, TINY), kind, seed)
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        # Rows in the file's order: applying it to what was read must give the file's rows.
        whole = got.dequantize() if isinstance(got, QuantTensor) else got[slice(None)]
        back = to_gguf_order(name, whole, TINY)
        assert np.allclose(back, want, rtol=2**-9, atol=1e-3 if kind.endswith("_K") else 0)
        assert kind.endswith("_K") or np.array_equal(back, want)


def test_float_matrices_are_rounded_and_codes_are_kept(tmp_path: Path) -> None:
    weights = random_weights(TINY)
    tensors = gguf_tensors(weights, TINY, "Q4_0")
    up = "model.layers.0.mlp.up_proj.weight"
    for name in (up, "lm_head.weight"):
        tensors[gguf_name(name)] = (weights[name].astype(np.float16), "F16")
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors)
    out = tmp_path / "m.lut"
    convert(path, out, bits=3, group_size=64, head_bits=6)
    with LutFile.open(out) as file:
        for name, bits, group_size, kind in (
            (up, 3, 64, "offset"),
            ("lm_head.weight", 6, 64, "offset"),
            ("model.embed_tokens.weight", 4, 32, "none"),
        ):
            packed, spec = file.linear(name)
            assert (spec.bits, spec.group_size, spec.offset_kind) == (bits, group_size, kind)
            codes, scales, offsets = _core.unpack(
                packed,
                m=spec.m,
                k=spec.k,
                bits=bits,
                group_size=group_size,
                offset_kind=spec.offset_kind,
            )
            if kind == "none":
                raw = encode(weights[name], "Q4_0")
                want = decode_tensor(raw, raw.shape[1] // 18 * 32, BLOCK_TYPES["Q4_0"])
            else:
                w = weights[name].astype(np.float16).astype(np.float32)
                want = quantize_rtn(w, bits=bits, group_size=64, asym=True, search="mse")
            assert np.array_equal(codes, want.codes)
            assert np.array_equal(scales, want.scales)
            if offsets is None or want.offsets is None:
                assert offsets is want.offsets is None
            else:
                assert np.array_equal(offsets, want.offsets)
        assert file.source["file"] == "m.gguf"
        assert "bits=3" in file.source["quantised"]


def test_two_conversions_are_equal_and_progress_is_told(tmp_path: Path) -> None:
    path = tiny(tmp_path / "m.gguf", "F16")
    calls: list[tuple[int, int, str]] = []
    convert(path, tmp_path / "a.lut", progress=lambda *call: calls.append(call))
    convert(path, tmp_path / "b.lut")
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()
    total = sum(w.size for w in random_weights(TINY).values())
    assert calls[0] == (0, total, "model.embed_tokens.weight")
    assert calls[-1] == (total, total, "")


def test_options_that_nothing_would_heed_are_refused(tmp_path: Path) -> None:
    path = tiny(tmp_path / "m.gguf")
    idle: list[dict[str, Any]] = [
        {"bits": 2},
        {"head_bits": 8},
        {"group_size": 64},
        {"asym": True},
        {"act_order": True, "quant": "gptq"},
        {"quant": "mse"},
        {"bits_for": [("down_proj", 3)]},
        {"target_bpw": 4.0},
        {"calibration": "text.txt"},
    ]
    for options in idle:
        with pytest.raises(UnsupportedError, match=f"{next(iter(options))} would have no effect"):
            convert(path, tmp_path / "m.lut", **options)
    refused: list[dict[str, Any]] = [{"bits": 9}, {"head_bits": 0}, {"group_size": 10}]
    for bad in refused:
        with pytest.raises(UnsupportedError, match="is not supported"):
            QuantOptions(**bad)


def test_a_scale_beyond_fp16_names_the_tensor_and_leaves_no_file(tmp_path: Path) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q4_K")
    raw = tensors["blk.1.ffn_up.weight"][0].copy()
    raw[3, 0:2] = np.array([60000], np.float16).view(np.uint8)  # d of a block, times its scales
    raw[3, 4:8] = 63
    tensors["blk.1.ffn_up.weight"] = (raw, "Q4_K")
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelFileError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*3\.78e\+06"):
        convert(path, tmp_path / "out" / "m.lut")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_conversion_leaves_no_file(tmp_path: Path) -> None:
    checkpoint = reader.read(tiny(tmp_path / "m.gguf"))
    (tmp_path / "out").mkdir()

    def stop(done: int, total: int, name: str) -> None:
        if done > total / 2:
            raise KeyboardInterrupt(name)

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(checkpoint, tmp_path / "out" / "m.lut", QuantOptions(), progress=stop)
    assert list((tmp_path / "out").iterdir()) == []


# Configurations


def config_of(tmp_path: Path, extra: Any = None, **metadata: Any) -> ModelConfig:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q8_0") | (extra or {})
    path = write_gguf(tmp_path / "c.gguf", TINY, tensors, metadata)
    return reader.read(path).config


def llama3_factors(factor: float = 8.0) -> NDArray[np.float32]:
    plain = TINY.rope()[0].astype(np.float64)
    config = dataclasses.replace(
        TINY,
        rope_scaling={
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    return (plain / config.rope()[0]).astype(np.float32)


def test_rope_scaling_keys(tmp_path: Path) -> None:
    assert config_of(tmp_path).rope_scaling is None
    key = "llama.rope.scaling."
    linear = config_of(tmp_path, **{key + "type": "linear", key + "factor": 4.0})
    assert linear.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert config_of(tmp_path, **{"llama.rope.scale_linear": 2.0}).rope_scaling == {
        "rope_type": "linear",
        "factor": 2.0,
    }
    yarn = config_of(
        tmp_path,
        **{key + "type": "yarn", key + "factor": 4.0, key + "original_context_length": 32},
    )
    assert yarn.rope_scaling == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    with pytest.raises(UnsupportedError, match="longrope"):
        config_of(tmp_path, **{key + "type": "longrope"})


def test_rope_factors_are_honoured(tmp_path: Path) -> None:
    factors = llama3_factors()
    config = config_of(tmp_path, {"rope_freqs.weight": (factors, "F32")})
    assert config.rope_scaling is not None
    assert config.rope_scaling["rope_type"] == "llama3"
    assert config.rope_scaling["factor"] == 8.0
    plain = TINY.rope()[0]
    assert np.allclose(config.rope()[0], plain / factors, rtol=1e-6)
    own = np.linspace(1, 3, 32, dtype=np.float32)
    config = config_of(tmp_path, {"rope_freqs.weight": (own, "F32")})
    assert config.rope_scaling is not None
    assert config.rope_scaling["rope_type"] == "factors"
    assert np.allclose(config.rope()[0], plain / own, rtol=1e-6)
    with pytest.raises(ModelFileError, match="rope_freqs"):
        config_of(tmp_path, {"rope_freqs.weight": (own[:16], "F32")})
    with pytest.raises(ModelFileError, match="not positive"):
        config_of(tmp_path, {"rope_freqs.weight": (own * 0, "F32")})


def test_tied_embeddings_and_epsilon(tmp_path: Path) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q8_0")
    del tensors["output.weight"]
    config = reader.read(write_gguf(tmp_path / "t.gguf", TINY, tensors)).config
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == 1e-5  # not 9.99999974e-06, as float32 holds it


# Refusals


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        ({"llama.rope.dimension_count": 32}, "rope.dimension_count is 32"),
        ({"llama.attention.value_length": 32}, "value_length is 32"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
        ({"split.count": 2}, "split"),
        ({"llama.attention.head_count": [4, 4]}, "head_count is of type list"),
        ({"llama.context_length": "long"}, "context_length is of type str"),
        ({"llama.attention.head_count": 0}, "head_count is 0"),
        ({"llama.feed_forward_length": None}, "feed_forward_length is missing"),
        ({"llama.attention.head_count_kv": 3}, "num_key_value_heads"),
    ],
)
def test_metadata_is_refused_with_a_reason(
    tmp_path: Path, metadata: dict[str, Any], text: str
) -> None:
    with pytest.raises(TmacError, match=text) as caught:
        config_of(tmp_path, **metadata)
    assert str(tmp_path / "c.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q8_0")
    path = write_gguf(tmp_path / "g.gguf", TINY, tensors, architecture="mamba")
    with pytest.raises(UnsupportedError, match="architecture 'mamba'"):
        reader.read(path)


def test_wrong_tensors_are_reported_together(tmp_path: Path) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q8_0")
    del tensors["blk.1.ffn_gate.weight"]
    tensors["blk.0.attn_q_norm.weight"] = (np.ones(64, np.float32), "F32")
    tensors["blk.0.ffn_down.weight"] = (
        encode(np.ones((256, 256), np.float32), "Q8_0"),
        "Q8_0",
    )
    path = write_gguf(tmp_path / "w.gguf", TINY, tensors)
    with pytest.raises(ModelFileError) as caught:
        reader.read(path)
    text = str(caught.value)
    assert "missing: blk.1.ffn_gate.weight [512, 256]" in text
    assert "not expected: blk.0.attn_q_norm.weight [64]" in text
    assert "blk.0.ffn_down.weight [256, 256] instead of [256, 512]" in text


def test_biases_and_unknown_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"biases.*blk\.0\.attn_q\.bias"):
        config_of(tmp_path, {"blk.0.attn_q.bias": (np.ones(256, np.float32), "F32")})
    integers = np.zeros((512, 256), np.int16)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.ffn_up\.weight I16 \(F32, .*MXFP4"):
        config_of(tmp_path, {"blk.0.ffn_up.weight": (integers, "I16")})
    norm = encode(np.ones((1, 256), np.float32), "Q8_0")[0]
    with pytest.raises(UnsupportedError, match=r"output_norm\.weight Q8_0"):
        config_of(tmp_path, {"output_norm.weight": (norm, "Q8_0")})
    for type_id in (5, 37, 200):
        set_type(tiny(tmp_path / "t.gguf"), "blk.0.ffn_up.weight", type_id)
        with pytest.raises(
            UnsupportedError, match=rf"ffn_up\.weight has the unknown type {type_id}"
        ):
            reader.read(tmp_path / "t.gguf")


def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = tiny(tmp_path / "m.gguf").read_bytes()
    start = whole.index(b"output_norm.weight")  # inside the tensor list
    cuts = [*range(0, start, 37), *range(start, len(whole), len(whole) // 40), len(whole) - 1]
    path = tmp_path / "cut.gguf"
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ModelFileError) as caught:
            reader.read(path)
        assert "\n" not in str(caught.value)
    size = len(whole)
    expected = f"tensor output.weight ends at byte {size}, the file at {size - 1}"
    assert expected in str(caught.value)
    path.write_bytes(whole)
    reader.read(path)


def test_altered_headers_never_crash_or_hang(tmp_path: Path) -> None:
    """Any byte of the header may be anything: the answer is a checkpoint or a TmacError."""
    whole = tiny(tmp_path / "m.gguf").read_bytes()
    end = whole.index(b"output_norm.weight") + 60
    rng = np.random.default_rng(8)
    path, refused = tmp_path / "x.gguf", []
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(4, end, rng.integers(1, 4)):
            data[at] = int(rng.choice([0, 1, 127, 128, 255, int(rng.integers(256))]))
        path.write_bytes(data)
        try:
            reader.read(path)
        except TmacError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert not any("\n" in text for text in refused)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGML" + bytes(100))
    with pytest.raises(ModelFileError, match="not a GGUF file"):
        convert(path, tmp_path / "x.lut")
    with pytest.raises(ModelFileError, match="no such file"):
        convert(tmp_path / "none.gguf", tmp_path / "x.lut")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(UnsupportedError, match="neither"):
        convert(tmp_path / "text.txt", tmp_path / "x.lut")
    (tmp_path / "model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UnsupportedError, match="pickle"):
        convert(tmp_path / "model.bin", tmp_path / "x.lut")


@pytest.mark.parametrize("name", ["_get", "_get_field_parts", "_build_tensors"])
def test_the_overridden_methods_of_gguf_are_still_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """They are private to gguf.GGUFReader: a renamed one would leave its checks unused."""
    ours, theirs = vars(_StrictReader)[name], vars(gguf.GGUFReader)[name]
    assert [*inspect.signature(ours).parameters] == [*inspect.signature(theirs).parameters]
    calls = []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(name)
        return ours(*args, **options)

    path = tiny(tmp_path / "m.gguf")
    monkeypatch.setattr(_StrictReader, name, counted)
    GGUFFile(path)
    assert calls
