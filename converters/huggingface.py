"""Reader for Hugging Face folders: config.json and safetensors, dense or quantised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tmac_py import generation_defaults
from tmac_py.config import ModelConfig, is_matrix
from tmac_py.converters.bitnet import master_formats
from tmac_py.converters.checkpoint import (
    NO_TOKENIZER,
    PICKLES,
    Checkpoint,
    Shape,
    TensorSource,
    as_float32,
    check_tensors,
    end_token_ids,
    listed,
    naming,
)
from tmac_py.converters.fused_experts import split_experts
from tmac_py.converters.fused_projections import StoredMatrix, load_rows, stored_matrices
from tmac_py.converters.huggingface_tokenizer import read_tokenizer_files
from tmac_py.converters.json_file import read_object
from tmac_py.converters.multimodal import decoder_config, decoder_tensors
from tmac_py.converters.quantization_config import all_dense, format_of, read_settings
from tmac_py.converters.safetensors_file import StoredTensor, read_header
from tmac_py.converters.weight_format import DENSE, FLOATS, Expected, Parts, WeightFormat
from tmac_py.errors import ModelFileError, TmacError, UnsupportedError
from tmac_py.families import family_of
from tmac_py.tokenizer import Tokenizer

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHT = ".weight"
_EMBEDDING = "model.embed_tokens.weight"
_UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Tensors of old checkpoints that hold nothing config.json does not say."""


_TEXT_ONLY = "{} is converted for text only: {} tensors of other parts are left out"
"""Warning; takes the path and how many."""

_SUB_NORMS = {"inner_attn_ln": "attn_sub_norm", "ffn_layernorm": "ffn_sub_norm"}
"""1bitLLM's names -> transformers' names."""


def detect(path: Path) -> bool:
    """Whether ``path`` is a folder with a config.json."""
    return (path / "config.json").is_file()


def read(path: Path) -> Checkpoint:
    """Check configuration, tokenizer and tensor list of the folder; weights stay mapped.

    Raises ModelFileError or UnsupportedError.
    """
    with naming(path):
        whole = read_object(path / "config.json")
        raw_config = decoder_config(whole)
        generation = read_object(path / generation_defaults.FILE, optional=True)
        config = ModelConfig.from_hf(raw_config, generation)
        quantization = read_settings(path, raw_config)
        if quantization:
            formats = format_of(*quantization)
        else:
            formats = master_formats if config.activation_bits else all_dense
        files = read_tokenizer_files(path)
        if files:
            config = replace(config, eos_token_ids=_end_tokens(config, files))
            if (defaults := generation_defaults.keep_defaults(generation)) is not None:
                files[generation_defaults.FILE] = defaults
    found, warnings = _stored_tensors(path), [] if files else [NO_TOKENIZER.format(path)]
    if raw_config is not whole:
        n_found, found = len(found), decoder_tensors(found)
        warnings.append(_TEXT_ONLY.format(path, n_found - len(found)))
    stored = {
        _ours(name): tensor
        for name, tensor in split_experts(found).items()
        if not _UNUSED.fullmatch(name)
        and not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    shapes = config.tensor_shapes()
    norm_offset = family_of(raw_config).norm_offset
    places = stored_matrices(shapes, stored)
    modules = {place.module: place.shape for place in places.values()}
    parts = _by_module(stored, modules, shapes)
    weights: dict[str, WeightFormat] = {}
    expected = {
        name: Expected(shape, FLOATS)
        for name, shape in shapes.items()
        if not is_matrix(name, shape)
    }
    with naming(path):
        for module, shape in modules.items():
            try:
                dense = module + _WEIGHT == _EMBEDDING
                weights[module] = DENSE if dense else formats(module, parts[module])
                wanted = weights[module].expected(shape, parts[module])
            except TmacError as error:
                raise type(error)(f"{module}: {error}") from error
            expected.update({f"{module}.{part}": tensor for part, tensor in wanted.items()})
    _check_stored(path, stored, expected)
    source = {"format": "huggingface", "file": path.resolve().name}
    if quantization:
        source["quant_method"] = quantization[0]
    return Checkpoint(
        config=config,
        tokenizer=files,
        source=source,
        tensors=[
            _matrix(name, shape, place, weights[place.module], parts[place.module])
            if (place := places.get(name)) is not None
            else _floats(name, stored[name], norm_offset)
            for name, shape in shapes.items()
        ],
        warnings=tuple(warnings),
    )


def _ours(name: str) -> str:
    """The name that transformers gives a tensor."""
    stem, _, part = name.rpartition(".")
    parent, _, module = stem.rpartition(".")
    return f"{parent}.{_SUB_NORMS[module]}.{part}" if module in _SUB_NORMS else name


def _by_module(
    stored: Mapping[str, StoredTensor], modules: Iterable[str], shapes: Mapping[str, Shape]
) -> dict[str, dict[str, StoredTensor]]:
    """For each module of a matrix its tensors, by what follows the module's name."""
    parts: dict[str, dict[str, StoredTensor]] = {module: {} for module in modules}
    for name, tensor in stored.items():
        module = name.rpartition(".")[0]
        while module and module not in parts:
            module = module.rpartition(".")[0]
        if module and (name not in shapes or is_matrix(name, shapes[name])):
            parts[module][name[len(module) + 1 :]] = tensor
    return parts


def _check_stored(
    path: Path, stored: Mapping[str, StoredTensor], expected: Mapping[str, Expected]
) -> None:
    """Names and shapes, reported together, then dtypes."""
    check_tensors(
        path,
        {name: tensor.shape for name, tensor in stored.items()},
        {name: wanted.shape for name, wanted in expected.items()},
    )
    bad = [
        f"{name} {stored[name].dtype} ({', '.join(wanted.dtypes)})"
        for name, wanted in expected.items()
        if stored[name].dtype not in wanted.dtypes
    ]
    if bad:
        raise UnsupportedError(f"{path}: dtypes are not supported: {listed(bad)}")


def _end_tokens(config: ModelConfig, files: dict[str, bytes]) -> tuple[int, ...]:
    """Ids that end an answer. Raises ModelFileError or UnsupportedError for a bad vocabulary."""
    tokenizer = Tokenizer(files, bos_id=config.bos_token_id)
    eos = None if tokenizer.eos_token is None else tokenizer.id_of(tokenizer.eos_token)
    pieces = ((tokenizer.piece(i), i) for i in tokenizer.special_ids)
    special = {piece: i for piece, i in pieces if piece is not None}
    return end_token_ids((*config.eos_token_ids, eos), special)


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder, from one file or from the shards its index names."""
    if (path / _SINGLE).is_file():
        return read_header(path / _SINGLE)
    if not (path / _INDEX).is_file():
        only = list(path.glob("*.safetensors"))
        if len(only) == 1:  # of a name of its own, as AutoGPTQ gives it
            return read_header(only[0])
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise UnsupportedError(
                f"{path}: {pickles[0]} is a pickle, which can run code when it is opened; "
                "safetensors files are needed"
            )
        raise ModelFileError(f"{path}: neither {_SINGLE} nor {_INDEX} is there")
    weight_map = read_object(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise ModelFileError(f"{path / _INDEX}: weight_map must name the file of each tensor")
    shards = sorted(set(weight_map.values()))
    if lost := [shard for shard in shards if not (path / shard).is_file()]:
        raise ModelFileError(f"{path}: shards are missing: {listed(lost)}")
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in read_header(path / shard).items():
            if weight_map.get(name) == shard:
                tensors[name] = tensor
    return tensors


def _floats(name: str, tensor: StoredTensor, norm_offset: float) -> TensorSource:
    def load() -> NDArray[np.float32]:
        values = as_float32(tensor.load())
        return values + np.float32(norm_offset) if name.endswith("norm.weight") else values

    return TensorSource(name, tensor.shape, load)


def _matrix(
    name: str, shape: Shape, place: StoredMatrix, weights: WeightFormat, parts: Parts
) -> TensorSource:
    load = partial(weights.load, place.shape, parts)
    if place.shape != shape:
        load = partial(load_rows, load, place.start, shape[0])
    return TensorSource(name, shape, load, dense=weights.dense, ordered=weights.ordered)
