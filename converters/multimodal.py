"""Folders of models for images and text: the decoder in them, as it would be in one of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from tmac_py.errors import ModelFileError

T = TypeVar("T")

_DECODERS = {"Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM", "gemma3_text")}
"""Architecture -> that of the decoder alone, and its model_type."""

_INHERITED = (
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "quantization_config",
)
"""Keys that count where config.json has them beside ``text_config``."""

_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
"""How names of the decoder's tensors begin, with transformers 4 and 5, and how they would alone."""

_OTHERS = tuple(
    f"{parent}{part}."
    for parent in ("", "model.")
    for part in ("vision_tower", "multi_modal_projector")
)


def decoder_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the decoder alone: ``config`` itself if there is nothing else."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    decoders = [_DECODERS[str(name)] for name in names if str(name) in _DECODERS]
    if not decoders:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelFileError("config.json: text_config must be an object")
    inherited = {key: config[key] for key in _INHERITED if config.get(key) is not None}
    architecture, model_type = decoders[0]
    own = {key: value for key, value in text.items() if value is not None}
    return {**own, **inherited, "architectures": [architecture], "model_type": model_type}


def decoder_tensors(tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors of the decoder, by the names they would have alone."""
    return {
        _alone(name): tensor for name, tensor in tensors.items() if not name.startswith(_OTHERS)
    }


def _alone(name: str) -> str:
    for prefix, ours in _PREFIXES:
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name
