"""LoRA adapters merged at conversion: peft's own merge, and adapters that must be refused.

tests/golden/lora.npz (make_lora.py) holds a tiny model, adapters and the matrices peft merges.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from altered_json import alterations
from mixed_safetensors import parse, save_mixed
from tiny_checkpoints import (
    TINY,
    gguf_tensors,
    random_weights,
    write_gguf,
)
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.lora import merge_lora
from tmac_py.errors import TmacError
from tmac_py.lutfile import LutFile

GOLDEN = Path(__file__).parent / "golden" / "lora.npz"
Q = "model.layers.0.self_attn.q_proj.weight"
A = f"base_model.model.{Q.removesuffix('.weight')}.lora_A.weight"
B = A.replace("lora_A", "lora_B")
Tensors = dict[str, NDArray[Any]]


def folders(
    path: Path,
    adapter: str,
    config: dict[str, Any] | None = None,
    tensors: Callable[[Tensors], object] | None = None,
) -> tuple[Path, Path, Tensors]:
    """Base and adapter, with changes to the adapter, and the merged matrices by name."""
    merged: Tensors = {}
    with np.load(GOLDEN) as arrays:
        for name, content in arrays.items():
            folder, _, file = name.partition("/")
            if file.startswith("merged/"):
                if folder == adapter:
                    merged[file.removeprefix("merged/")] = content
            elif folder in ("base", adapter):
                (path / folder).mkdir(exist_ok=True)
                (path / folder / file).write_bytes(content.tobytes())
    file = path / adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
    if tensors is not None:
        weights = path / adapter / "adapter_model.safetensors"
        stored = parse(weights.read_bytes())
        tensors(stored)
        save_mixed(weights, stored, "F32")
    return path / "base", path / adapter, merged


@pytest.mark.parametrize("name", ["plain", "patterns", "rslora"])
def test_merged_matrices_are_those_of_peft(tmp_path: Path, name: str) -> None:
    """Both are float32 sums of r + 1 terms, so they differ by r + 3 roundings of the terms' size
    each, with the scale's own and that of its product with B; r is at most 5."""
    base, adapter, merged = folders(tmp_path, name)
    plain = {tensor.name: tensor.load() for tensor in open_checkpoint(base).tensors}
    checkpoint = merge_lora(open_checkpoint(base), adapter)
    assert checkpoint.source["lora"] == name
    assert [tensor.name for tensor in checkpoint.tensors] == list(plain)
    changed = set()
    for tensor in checkpoint.tensors:
        got, before = tensor.load(), plain[tensor.name]
        whole, old = got[slice(None)], before[slice(None)]  # type: ignore[index]
        if tensor.name not in merged:
            assert np.array_equal(whole, old)
            continue
        changed.add(tensor.name)
        want = merged[tensor.name]
        size = np.abs(old) + np.abs(want - old).max() * 5
        assert (np.abs(whole - want) <= 2 * 8 * 2.0**-24 * size).all()
        assert np.abs(want - old).max() > 0.01
        assert np.array_equal(got[slice(3, 9)], whole[3:9])  # type: ignore[index]
    assert changed == set(merged)


def test_a_merged_model_converts(tmp_path: Path) -> None:
    base, adapter, merged = folders(tmp_path, "patterns")
    for out in ("a.lut", "b.lut"):
        convert(base, tmp_path / out, lora=adapter, bits=8, head_bits=8)
    convert(base, tmp_path / "plain.lut", bits=8, head_bits=8)
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()
    with LutFile.open(tmp_path / "a.lut") as one, LutFile.open(tmp_path / "plain.lut") as other:
        assert one.source["lora"] == "patterns"
        assert "lora" not in other.source
        for name, entry in one.tensors.items():
            assert (entry.xxh3 != other.tensors[name].xxh3) == (name in merged)


def test_gguf_files_take_adapters_too(tmp_path: Path) -> None:
    """By Hugging Face's names and in its order of rows."""
    weights = random_weights(TINY)
    path = write_gguf(tmp_path / "m.gguf", TINY, gguf_tensors(weights, TINY, "F32"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    rng = np.random.default_rng(1)
    a, b = (rng.normal(0, 0.1, s).astype(np.float32) for s in ((2, 256), (256, 2)))
    save_mixed(adapter / "adapter_model.safetensors", {A: a, B: b}, "F32")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged = {t.name: t for t in merge_lora(open_checkpoint(path), adapter).tensors}[Q].load()
    want = weights[Q] + 4 * b.astype(np.float64) @ a
    assert np.allclose(merged[slice(None)], want, rtol=0, atol=1e-6)  # type: ignore[index]


def test_fan_in_fan_out_is_for_other_modules(tmp_path: Path) -> None:
    base, adapter, _ = folders(tmp_path, "plain", {"fan_in_fan_out": True})
    warnings: list[str] = []
    convert(base, tmp_path / "a.lut", lora=adapter, warn=warnings.append)
    assert any("fan_in_fan_out is ignored, as peft does" in text for text in warnings)
    folders(tmp_path, "plain")
    convert(base, tmp_path / "b.lut", lora=adapter)
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return apply


@pytest.mark.parametrize(
    ("config", "tensors", "text"),
    [
        ({"use_dora": True}, None, "DoRA (use_dora) cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, None, "(modules_to_save) cannot be merged"),
        ({"trainable_token_indices": [1]}, None, "trained embeddings of tokens"),
        ({"peft_type": "IA3"}, None, "peft_type 'IA3' is not supported (LORA)"),
        ({"bias": "all"}, None, "bias 'all' is not supported (none)"),
        ({"init_lora_weights": "pissa"}, None, "init_lora_weights 'pissa' changed the base model"),
        ({"r": 3}, None, "lora_A [4, 32] does not have rank 3"),
        ({"lora_alpha": None}, None, "lora_alpha must be a positive number, found None"),
        ({"lora_alpha": True}, None, "lora_alpha must be a positive number, found True"),
        ({"alpha_pattern": {"(a+)+": 1}}, None, "alpha_pattern '(a+)+' is not supported (names"),
        ({"rank_pattern": [1]}, None, "rank_pattern must be an object"),
        ({}, rename("q_proj", "qkv_proj"), "not in the model: model.layers.0.self_attn.qkv_proj"),
        ({}, rename("layers.0", "layers.7"), "not in the model: model.layers.7.self_attn.q_proj"),
        ({}, rename("lora_A", "lora_embedding_A"), "only matrices lora_A and lora_B of linear"),
        ({}, lambda t: t.update({A + "x": t[A]}), "only matrices lora_A and lora_B of linear"),
        ({}, lambda t: t.pop(B), "lora_A or lora_B is missing: model.layers.0.self_attn.q_proj"),
        ({}, lambda t: t.clear(), "adapter_model.safetensors holds no tensors"),
        (
            {},
            lambda t: t.update({B: t[B][:30]}),
            "of another shape: model.layers.0.self_attn.q_proj.weight [30, 32] instead of [32, 32]",
        ),
        ({}, lambda t: t.update({B: t[B][:, :3]}), "lora_A and lora_B of different ranks"),
        ({}, lambda t: t.update({B: t[B] * np.float32(np.nan)}), "weights are not finite"),
    ],
)
def test_refusals(
    tmp_path: Path,
    config: dict[str, Any],
    tensors: Callable[[Tensors], object] | None,
    text: str,
) -> None:
    base, adapter, _ = folders(tmp_path, "plain", config, tensors)
    with pytest.raises(TmacError) as caught:
        convert(base, tmp_path / "m.lut", lora=adapter)
    assert text in str(caught.value)
    assert str(caught.value).startswith((f"{adapter}:", f"{base}:"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.lut").exists()


def test_settings_of_any_other_form_are_read_or_refused(tmp_path: Path) -> None:
    base, adapter, _ = folders(tmp_path, "patterns")
    checkpoint, refused = open_checkpoint(base), []
    file = adapter / "adapter_config.json"
    for value in alterations(json.loads(file.read_text())):
        file.write_text(json.dumps(value))
        try:
            merge_lora(checkpoint, adapter)
        except TmacError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(text.startswith(str(adapter)) and "\n" not in text for text in refused)


def test_stored_codes_take_no_adapter(tmp_path: Path) -> None:
    tensors = gguf_tensors(random_weights(TINY), TINY, "Q4_0")
    path = write_gguf(tmp_path / "m.gguf", TINY, tensors)
    _, adapter, _ = folders(tmp_path, "plain")
    with pytest.raises(TmacError, match=r"stored as codes, .*: model\.layers\.0\.self_attn\.q_p"):
        convert(path, tmp_path / "m.lut", lora=adapter)


def test_folders_that_are_no_adapters(tmp_path: Path) -> None:
    base, adapter, _ = folders(tmp_path, "plain")
    with pytest.raises(TmacError, match=r"no adapter_config\.json: not the folder of a peft"):
        convert(base, tmp_path / "m.lut", lora=base)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(TmacError, match=r"adapter_model\.safetensors is missing"):
        convert(base, tmp_path / "m.lut", lora=adapter)
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(TmacError, match=r"adapter_model\.bin is a pickle"):
        convert(base, tmp_path / "m.lut", lora=adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"\x80")
    with pytest.raises(TmacError, match="truncated"):
        convert(base, tmp_path / "m.lut", lora=adapter)
