"""BitNet in GGUF files, as llama.cpp and bitnet.cpp write it: the same as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_checkpoints import encode_i2_s, gguf_name, set_type, write_gguf, write_hf
from tmac_py import Model
from tmac_py.config import ModelConfig
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.bitnet import exact_ternary
from tmac_py.converters.checkpoint import HEADS
from tmac_py.errors import TmacError
from tmac_py.quant import QuantTensor

CONFIG: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "tie_word_embeddings": True,
    "quantization_config": {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
    },
}
FORMS: dict[str, dict[str, Any]] = {
    "bitnet": {"model_type": "llama", "architectures": ["BitnetForCausalLM"]},
    "bitnet-25": {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]},
    "bitnet-b1.58": {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]},
}


def both(tmp_path: Path, name: str, kind: str) -> tuple[Path, Path]:
    """The same random model as a folder and as a GGUF file of that architecture and type."""
    values = {**CONFIG, **FORMS[name]}
    config = ModelConfig.from_hf(values)
    rng = np.random.default_rng(0)
    folder: dict[str, NDArray[np.float32]] = {}
    tensors: dict[str, tuple[NDArray[Any], str]] = {}
    shapes, flat = {}, []
    for i, (tensor, shape) in enumerate(config.tensor_shapes().items()):
        theirs = gguf_name(tensor)
        if len(shape) == 1 or tensor in HEADS:
            folder[tensor] = rng.normal(1, 0.2, shape).astype(np.float16).astype(np.float32)
            tensors[theirs] = (folder[tensor], "F32")
            continue
        codes = rng.integers(0, 3, shape, dtype=np.uint8)
        scale = np.float32(0.0625 * (i + 1))
        folder[tensor] = codes.astype(np.float32) - 1
        folder[f"{tensor}_scale"] = np.array([scale])
        if kind == "I2_S":
            tensors[theirs] = (encode_i2_s(codes, float(scale)), "I8")
            shapes[theirs] = shape
            flat.append(theirs)
        else:
            stored = gguf.GGMLQuantizationType[kind]
            tensors[theirs] = (gguf.quants.quantize(folder[tensor] * scale, stored), kind)
    metadata = {
        f"{name}.rope.scaling.type": "linear",
        f"{name}.rope.scaling.factor": 1.0,
        f"{name}.vocab_size": config.vocab_size,
    }
    path = write_gguf(
        tmp_path / "m.gguf", config, tensors, metadata, architecture=name, shapes=shapes
    )
    for tensor in flat:
        set_type(path, tensor, 36)
    return write_hf(tmp_path / "hf", folder, values), path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bitnet", "TQ1_0"),
        ("bitnet", "F16"),
        ("bitnet-25", "TQ2_0"),
        ("bitnet-b1.58", "I2_S"),
        ("bitnet-b1.58", "BF16"),
    ],
)
def test_a_gguf_file_is_the_same_model_as_a_folder(tmp_path: Path, name: str, kind: str) -> None:
    folder, file = both(tmp_path, name, kind)
    ours, theirs = (open_checkpoint(source).config for source in (folder, file))
    assert theirs == ours
    assert (theirs.sub_norms, theirs.activation_bits) == (True, 8)
    assert theirs.hidden_act == ("silu" if name == "bitnet" else "relu2")
    for source in (folder, file):
        convert(source, tmp_path / f"{source.name}.lut", head_bits=8)
    ids = np.random.default_rng(1).integers(0, CONFIG["vocab_size"], 24)
    with Model.load(tmp_path / "hf.lut") as a, Model.load(tmp_path / "m.gguf.lut") as b:
        assert a.tables == b.tables == "exact8"
        assert np.array_equal(a.logits(ids), b.logits(ids))
        assert a.logits(ids).std() > 0.1


def test_floats_that_are_not_ternary_are_refused(tmp_path: Path) -> None:
    _, path = both(tmp_path, "bitnet", "F32")
    data = bytearray(path.read_bytes())
    tensors = open_checkpoint(path).tensors
    matrix = next(t for t in tensors if t.name.endswith("down_proj.weight")).load()
    assert isinstance(matrix, QuantTensor)
    at = data.index(4 * np.float32(matrix.scale).tobytes())
    data[at : at + 4] = np.float32(0.03).tobytes()
    path.write_bytes(data)
    with pytest.raises(
        TmacError, match=r"0\.mlp\.down_proj\.weight: weights of a BitNet model must be -s, 0"
    ):
        convert(path, tmp_path / "m.lut")
    assert not (tmp_path / "m.lut").exists()


def test_exact_ternary() -> None:
    w = np.array([[0.5, -0.5, 0, 0.5], [0, 0, 0, -0.5]], np.float32)
    q = exact_ternary(w)
    assert (q.scale, q.codes.tolist()) == (0.5, [[2, 0, 1, 2], [1, 1, 1, 0]])
    assert not exact_ternary(np.zeros((3, 4), np.float32)).dequantize().any()
    for bad in (np.nan, np.inf, 0.25):
        w[1, 2] = bad
        with pytest.raises(ValueError, match=r"-s, 0 and s|not finite"):
            exact_ternary(w)
