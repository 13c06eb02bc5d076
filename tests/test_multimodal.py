"""Folders of models for images and text: converted as the decoder in them alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from test_families import Golden
from tmac_py.config import ModelConfig
from tmac_py.converters import convert, open_checkpoint
from tmac_py.converters.multimodal import decoder_config
from tmac_py.errors import ModelFileError

Rename = Callable[[str], str]
OTHERS = ("vision_tower.embeddings.weight", "multi_modal_projector.mm_soft_emb_norm.weight")


def transformers_4(name: str) -> str:
    return f"language_model.{name}"


def transformers_5(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def wrapped(alone: Path, folder: Path, rename: Rename, parent: str) -> Path:
    """The model of the folder ``alone`` among other parts."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = json.loads((alone / "config.json").read_text())
    outside = {"dtype": config.pop("dtype"), "architectures": ["Gemma3ForConditionalGeneration"]}
    config.pop("architectures")
    whole = {**outside, "model_type": "gemma3", "text_config": config, "vision_config": {}}
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = {rename(n): w for n, w in load_file(alone / "model.safetensors").items()}
    tensors |= {f"{parent}{name}": np.ones((4, 4), np.float32) for name in OTHERS}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("rename", "parent"), [(transformers_4, ""), (transformers_5, "model.")])
def test_the_decoder_of_gemma_3(tmp_path: Path, rename: Rename, parent: str) -> None:
    alone = Golden("gemma3").folder(tmp_path / "a" / "hf")
    whole = wrapped(alone, tmp_path / "b" / "hf", rename, parent)
    notes: list[str] = []
    convert(alone, tmp_path / "a.lut")
    convert(whole, tmp_path / "b.lut", warn=notes.append)
    assert (tmp_path / "a.lut").read_bytes() == (tmp_path / "b.lut").read_bytes()
    assert notes[-1] == f"{whole} is converted for text only: 2 tensors of other parts are left out"
    assert len(notes) == 1 + len(open_checkpoint(alone).warnings)


def test_keys_beside_the_text_and_those_that_are_not_said() -> None:
    """As Google's config.json has them: sizes that transformers takes for granted are absent."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "eos_token_id": 1,
    }
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "model_type": "gemma3",
        "text_config": text,
        "torch_dtype": "bfloat16",
        "vision_config": {"hidden_size": 1152},
    }
    config = ModelConfig.from_hf(decoder_config(whole))
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.tie_word_embeddings) == (262208, True)
    assert (config.embedding_scale, config.eos_token_ids) == (50.5, (1, 106))
    assert config.full_attention_layers == (5, 11, 17, 23, 29)
    with pytest.raises(ModelFileError, match="text_config must be an object"):
        decoder_config({**whole, "text_config": None})
    alone = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"}
    assert decoder_config(alone) is alone
