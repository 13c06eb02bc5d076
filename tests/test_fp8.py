"""Matrices of 8-bit floats: transformers' dequantisation, and every way scales are stored in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from altered_json import alterations
from mixed_safetensors import save_mixed
from tiny_checkpoints import hf_config, random_weights
from tmac_py.config import ModelConfig
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.fp8 import TABLES, Fp8Matrix
from tmac_py.errors import ModelFileError, TmacError
from tmac_py.lutfile import LutFile

GOLDEN = Path(__file__).parent / "golden" / "fp8.npz"

SMALL = ModelConfig(
    hidden_size=40,
    intermediate_size=72,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    vocab_size=33,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
UP = "model.layers.0.mlp.up_proj.weight"
Tensors = dict[str, NDArray[Any]]


def golden() -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def test_all_numbers_are_those_of_pytorch() -> None:
    arrays = golden()
    for name, table in TABLES.items():
        want = arrays[name.removeprefix("F8_").lower()]
        assert np.array_equal(table, want, equal_nan=True)
        assert np.array_equal(np.signbit(table), np.signbit(want))


def test_blocks_equal_the_dequantisation_of_transformers(tmp_path: Path) -> None:
    arrays, folder = golden(), tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(arrays[name].tobytes())
    found = {tensor.name: tensor for tensor in open_checkpoint(folder).tensors}
    matrices = {name[2:]: a for name, a in arrays.items() if name.startswith("w.")}
    assert len(matrices) == 7
    for name, want in matrices.items():
        matrix = found[name].load()
        assert isinstance(matrix, Fp8Matrix)
        assert found[name].dense
        assert np.array_equal(matrix[slice(None)], want)
        assert np.array_equal(matrix[slice(5, 23)], want[5:23])
    for out in ("a.lut", "b.lut"):
        convert(folder, tmp_path / out, bits=4)
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()
    with LutFile.open(tmp_path / "a.lut") as file:
        assert file.linear(UP)[1].bits == 4
        assert file.config.activation_bits is None


BLOCK = (16, 12)

SHAPES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "number": lambda *_: (),
    "one": lambda *_: (1,),
    "matrix of one": lambda *_: (1, 1),
    "rows": lambda *shape: (shape[0],),
    "column": lambda *shape: (shape[0], 1),
    "blocks": lambda *shape: (-(-shape[0] // BLOCK[0]), -(-shape[1] // BLOCK[1])),
}
"""Shapes of the scales of a matrix [m, k]."""


def scales_of(form: str, m: int, k: int) -> NDArray[np.float32]:
    exponents = np.random.default_rng(2).integers(-9, 0, SHAPES[form](m, k))
    return np.asarray(np.ldexp(1.5, exponents), np.float32)


def folder(
    path: Path,
    form: str = "number",
    *,
    part: str = "weight_scale",
    kind: str = "F8_E4M3",
    method: str = "fp8",
    settings: dict[str, Any] | None = None,
    tensors: Callable[[Tensors], object] | None = None,
) -> Path:
    """Random bytes as matrices with scales of a form; embeddings fp16, norms fp32."""
    rng, stored, dtypes = np.random.default_rng(1), {}, {}
    for name, w in random_weights(SMALL).items():
        stored[name] = w
        if w.ndim == 2:
            dtypes[name] = "F16"
        if w.ndim == 2 and "layers" in name:
            finite = np.flatnonzero(np.isfinite(TABLES[kind])).astype(np.uint8)
            stored[name], dtypes[name] = rng.choice(finite, w.shape), kind
            scale = f"{name.removesuffix('weight')}{part}"
            stored[scale], dtypes[scale] = scales_of(form, *w.shape), "BF16"
    if tensors is not None:
        tensors(stored)
    path.mkdir()
    config = hf_config(SMALL, quantization_config={"quant_method": method, **(settings or {})})
    (path / "config.json").write_text(json.dumps(config))
    save_mixed(path / "model.safetensors", stored, "F32", dtypes)
    return path


def compressed(block: list[int] | None = None, **changes: Any) -> dict[str, Any]:
    """Settings of llm-compressor's FP8 schemes; activations are rounded as it says, or not."""
    weights = {"type": "float", "num_bits": 8, "block_structure": block, **changes}
    inputs = {"type": "float", "num_bits": 8, "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"format": "float-quantized", "config_groups": {"group_0": group}}


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("number", {}),
        ("one", {}),
        ("matrix of one", {"part": "weight_scale_inv"}),
        ("rows", {"kind": "F8_E5M2"}),
        ("column", {"method": "fbgemm_fp8"}),
        ("number", {"method": "compressed-tensors", "settings": compressed()}),
        ("column", {"method": "compressed-tensors", "settings": compressed()}),
        ("blocks", {"method": "compressed-tensors", "settings": compressed(list(BLOCK))}),
        ("blocks", {"part": "weight_scale_inv", "settings": {"weight_block_size": list(BLOCK)}}),
    ],
)
def test_scales_of_every_form(tmp_path: Path, form: str, options: dict[str, Any]) -> None:
    path = folder(tmp_path / "m", form, **options)
    table = TABLES[options.get("kind", "F8_E4M3")]
    for tensor in open_checkpoint(path).tensors:
        if len(tensor.shape) == 1 or "layers" not in tensor.name:
            continue
        matrix = tensor.load()
        assert isinstance(matrix, Fp8Matrix)
        m, k = tensor.shape
        scales = scales_of(form, m, k)
        if form == "rows":
            scales = scales[:, None]
        if form == "blocks":
            scales = scales.repeat(BLOCK[0], axis=0)[:m].repeat(BLOCK[1], axis=1)[:, :k]
        want = (table[matrix.stored] * scales).astype(np.float32)
        assert np.array_equal(matrix[slice(None)], want)
        assert np.array_equal(matrix[slice(15, 18)], want[15:18])


def test_scales_of_activations_are_left_out(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors[UP.replace("weight", "input_scale")] = np.array(0.5, np.float32)

    path = folder(tmp_path / "m", tensors=add)
    assert len(open_checkpoint(path).tensors) == len(SMALL.tensor_shapes())


def with_value(name: str, value: float) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[0] = value

    return apply


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tensors": with_value(UP, 0x7F)}, rf"tensor {UP}: weights are not finite"),
        ({"tensors": with_value(UP + "_scale", np.nan)}, rf"{UP}: {UP}_scale is not finite"),
        ({"tensors": with_value(UP + "_scale", np.inf)}, rf"{UP}: {UP}_scale is not finite"),
        (
            {"tensors": lambda t: t.pop(UP + "_scale")},
            r"missing: model\.layers\.0\.mlp\.up_proj\.weight_scale_inv \[1, 1\]",
        ),
        (
            {"tensors": lambda t: t.update({UP + "_scale": np.ones(3, np.float32)})},
            r"up_proj\.weight_scale \[3\] instead of \[1, 1\]",
        ),
        (
            {"method": "compressed-tensors", "settings": compressed(type="int")},
            "compressed-tensors .* not supported",
        ),
        (
            {"method": "compressed-tensors", "settings": compressed([3])},
            r"weight_block_size \[3\] is not supported",
        ),
        ({"settings": {"weight_block_size": [0, 128]}}, r"weight_block_size \[0, 128\] is not"),
        ({"settings": {"weight_block_size": 128}}, "weight_block_size 128 is not supported"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    path = folder(tmp_path / "m", **options)
    with pytest.raises(TmacError, match=text) as caught:
        convert(path, tmp_path / "m.lut")
    assert str(caught.value).startswith(str(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors", **compressed([128, 128])},
    ],
)
def test_settings_of_any_other_form_are_read_or_refused(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    path, refused = folder(tmp_path / "m"), []
    config = json.loads((path / "config.json").read_text())
    for value in alterations(settings):
        (path / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
        try:
            open_checkpoint(path)
        except TmacError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all(text.startswith(str(path)) and "\n" not in text for text in refused)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "m")
    name = "model-00001-of-00002.safetensors"
    (path / "model.safetensors").rename(path / name)
    weight_map = dict.fromkeys(SMALL.tensor_shapes(), name)
    weight_map |= {"lm_head.weight": "model-00002-of-00002.safetensors"}
    index = {"weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=r"shards are missing: model-00002-of-00002\.safe"):
        convert(path, tmp_path / "m.lut")
