"""Reader for folders of dense Hugging Face checkpoints: config.json and safetensors."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tmac_py.config import ModelConfig
from tmac_py.converters.base import (
    NO_TOKENIZER,
    Checkpoint,
    FloatMatrix,
    TensorSource,
    as_float32,
    check_tensors,
)
from tmac_py.converters.huggingface_tokenizer import read_tokenizer
from tmac_py.converters.safetensors_file import StoredTensor, read_header
from tmac_py.errors import ModelFileError, UnsupportedError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DENSE = ("F32", "F16", "BF16")
_UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that hold nothing config.json does not say."""


def detect(path: Path) -> bool:
    """Whether ``path`` is a folder with a config.json."""
    return (path / "config.json").is_file()


def read(path: Path) -> Checkpoint:
    """Check configuration, tokenizer and tensor list of the folder; weights stay mapped.

    Raises ModelFileError or UnsupportedError.
    """
    try:
        config = ModelConfig.from_hf(
            read_json(path / "config.json"), read_json(path / "generation_config.json", {})
        )
    except (ModelFileError, UnsupportedError) as error:
        text = str(error)
        raise type(error)(text if text.startswith(str(path)) else f"{path}: {text}") from error
    tokenizer = read_tokenizer(path)
    config = replace(config, add_bos_token=tokenizer.add_bos_token)
    expected = config.tensor_shapes()
    stored = {
        name: tensor
        for name, tensor in _stored_tensors(path).items()
        if not _UNUSED.fullmatch(name)
        and not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    check_tensors(path, {name: tensor.shape for name, tensor in stored.items()}, expected)
    bad = [f"{name} {stored[name].dtype}" for name in expected if stored[name].dtype not in _DENSE]
    if bad:
        raise UnsupportedError(
            f"{path}: dtypes are not supported: {', '.join(bad[:8])}"
            f"{f' and {len(bad) - 8} more' if len(bad) > 8 else ''} ({', '.join(_DENSE)})"
        )
    return Checkpoint(
        config=config,
        tokenizer=tokenizer.files,
        source={"format": "huggingface", "file": path.resolve().name},
        tensors=[_source(name, stored[name]) for name in expected],
        warnings=() if tokenizer.files else (NO_TOKENIZER.format(path),),
    )


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file; ``default`` where there is no such file.

    Raises ModelFileError for anything else than a JSON object.
    """
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{path}: a JSON object is needed")
    return value


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, from one file or from the shards its index names."""
    if (path / _SINGLE).is_file():
        return read_header(path / _SINGLE)
    if not (path / _INDEX).is_file():
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise UnsupportedError(
                f"{path}: {pickles[0]} is a pickle, which can run code when it is opened; "
                "safetensors files are needed"
            )
        raise ModelFileError(f"{path}: neither {_SINGLE} nor {_INDEX} is there")
    weight_map = read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise ModelFileError(f"{path / _INDEX}: weight_map must name the file of each tensor")
    shards = sorted(set(weight_map.values()))
    if lost := [shard for shard in shards if not (path / shard).is_file()]:
        raise ModelFileError(f"{path}: shards are missing: {', '.join(lost)}")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_header(path / shard).items():
            if weight_map.get(name) == shard:
                tensors[name] = tensor
    return tensors


def _source(name: str, tensor: StoredTensor) -> TensorSource:
    if len(tensor.shape) == 1:
        return TensorSource(name, tensor.shape, lambda: as_float32(tensor.load()))
    return TensorSource(name, tensor.shape, partial(_matrix, tensor), dense=True)


def _matrix(tensor: StoredTensor) -> FloatMatrix:
    return FloatMatrix(tensor.load())
