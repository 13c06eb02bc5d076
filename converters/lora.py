"""LoRA adapters (Hu et al., 2021, arXiv 2106.09685) in peft's folders, merged into float matrices.

``W + s B A`` with ``s = alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised ones
(Kalajdzievski, 2023, arXiv 2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.converters.checkpoint import (
    Checkpoint,
    Shape,
    TensorSource,
    as_float32,
    listed,
    naming,
)
from tmac_py.converters.json_file import read_object
from tmac_py.converters.safetensors_file import StoredTensor, read_header
from tmac_py.converters.weight_format import FLOATS
from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.quant import MatrixLike, QuantTensor

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.\w+)?\.weight")

_OTHER_ARITHMETIC = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "updates of bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "modules_to_save": "whole modules that were trained",
    "trainable_token_indices": "trained embeddings of tokens",
}
"""Settings that mean more than adding B A, if they are set."""

_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
"""init_lora_weights that left the base model as it was; others took from it what A and B got."""


@dataclass(frozen=True)
class _Update:
    """``scale * b @ a`` of one matrix: a ``[r, k]``, b ``[m, r]``."""

    a: StoredTensor
    b: StoredTensor
    scale: float


def merge_lora(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with an adapter's updates added to its matrices, row by row as they are read.

    Raises ModelFileError or UnsupportedError for an adapter that is broken, that does more than
    adding products of two matrices, or that does not fit the checkpoint.
    """
    with naming(folder):
        config = _read_config(folder)
        updates = _read_updates(folder, config)
        _check_targets(checkpoint, updates)
    warnings = checkpoint.warnings
    if config.get("fan_in_fan_out"):
        warnings += (f"{folder}: fan_in_fan_out is ignored, as peft does for linear modules",)
    return replace(
        checkpoint,
        source={**checkpoint.source, "lora": folder.resolve().name},
        tensors=[
            _merged(tensor, updates[tensor.name]) if tensor.name in updates else tensor
            for tensor in checkpoint.tensors
        ],
        warnings=warnings,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / _CONFIG).is_file():
        raise ModelFileError(f"no {_CONFIG}: not the folder of a peft adapter")
    config = read_object(folder / _CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise UnsupportedError(f"{_CONFIG}: peft_type {kind!r} is not supported (LORA)")
    for key, meaning in _OTHER_ARITHMETIC.items():
        if config.get(key):
            raise UnsupportedError(f"{_CONFIG}: {meaning} ({key}) cannot be merged")
    if (bias := config.get("bias", "none")) != "none":
        raise UnsupportedError(f"{_CONFIG}: bias {bias!r} is not supported (none)")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | None) and start not in _PLAIN_STARTS:
        raise UnsupportedError(
            f"{_CONFIG}: init_lora_weights {start!r} changed the base model; save the adapter as a "
            "plain one (peft: path_initial_model_for_weight_conversion)"
        )
    return config


def _read_updates(folder: Path, config: Mapping[str, Any]) -> dict[str, _Update]:
    """Name of a matrix -> its update."""
    if not (folder / _WEIGHTS).is_file():
        if (folder / "adapter_model.bin").is_file():
            raise UnsupportedError(
                "adapter_model.bin is a pickle, which can run code when it is opened; "
                f"{_WEIGHTS} is needed"
            )
        raise ModelFileError(f"{_WEIGHTS} is missing")
    halves: dict[str, dict[str, StoredTensor]] = {}
    other = []
    for name, tensor in read_header(folder / _WEIGHTS).items():
        match = _NAME.fullmatch(name)
        if match is None or tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            other.append(f"{name} {tensor.dtype} {list(tensor.shape)}")
        else:
            halves.setdefault(match[1], {})[match[2]] = tensor
    if other:
        raise UnsupportedError(
            f"{_WEIGHTS}: only matrices lora_A and lora_B of linear modules can be merged "
            f"({', '.join(FLOATS)}), not {listed(other)}"
        )
    if not halves:
        raise ModelFileError(f"{_WEIGHTS} holds no tensors")
    if single := [module for module, pair in halves.items() if len(pair) < 2]:
        raise ModelFileError(f"{_WEIGHTS}: lora_A or lora_B is missing: {listed(single)}")
    updates = {}
    for module, pair in halves.items():
        a, b = pair["A"], pair["B"]
        rank = a.shape[0]
        if (stated := _of_module(config, module, "rank_pattern", "r")) != rank:
            raise ModelFileError(f"{module}: lora_A {list(a.shape)} does not have rank {stated}")
        alpha = _of_module(config, module, "alpha_pattern", "lora_alpha")
        divisor = math.sqrt(rank) if config.get("use_rslora") else rank
        updates[f"{module}.weight"] = _Update(a, b, alpha / divisor)
    return updates


def _of_module(config: Mapping[str, Any], module: str, pattern: str, key: str) -> float:
    """A positive number for one module; patterns are ends of names, of whole parts."""
    by_name = config.get(pattern) or {}
    if not isinstance(by_name, dict):
        raise ModelFileError(f"{_CONFIG}: {pattern} must be an object")
    value = config.get(key)
    for name, own in by_name.items():
        if not re.fullmatch(r"[\w.]+", name):
            raise UnsupportedError(
                f"{_CONFIG}: {pattern} {name!r} is not supported (names, no patterns)"
            )
        if f".{module}".endswith(f".{name}"):
            value = own
            break
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ModelFileError(f"{_CONFIG}: {key} must be a positive number, found {value!r}")
    return value


def _check_targets(checkpoint: Checkpoint, updates: Mapping[str, _Update]) -> None:
    known = {tensor.name: tensor for tensor in checkpoint.tensors if tensor.is_matrix}
    absent = [name for name in updates if name not in known]
    codes = [name for name in updates if name in known and not known[name].dense]
    misshaped = [
        f"{name} {list(found)} instead of {list(known[name].shape)}"
        for name, update in updates.items()
        if name in known and (found := (update.b.shape[0], update.a.shape[1])) != known[name].shape
    ]
    bad_rank = [name for name, u in updates.items() if u.b.shape[1] != u.a.shape[0]]
    complaints = [
        f"{what}: {listed(names)}"
        for what, names in (
            ("not in the model", absent),
            ("stored as codes, to which nothing can be added", codes),
            ("of another shape", misshaped),
            ("lora_A and lora_B of different ranks", bad_rank),
        )
        if names
    ]
    if complaints:
        raise ModelFileError(f"targets {'; '.join(complaints)}")


def _merged(tensor: TensorSource, update: _Update) -> TensorSource:
    def load() -> MatrixLike:
        base = tensor.load()
        assert not isinstance(base, QuantTensor)
        a, b = as_float32(update.a.load()), as_float32(update.b.load())
        return _MergedMatrix(base, a, b * np.float32(update.scale))

    return replace(tensor, load=load)


@dataclass(frozen=True)
class _MergedMatrix:
    """``base + b @ a`` in float32, computed for the rows that are sliced."""

    base: MatrixLike
    a: NDArray[np.float32]
    b: NDArray[np.float32]

    @property
    def shape(self) -> Shape:
        """``(m, k)``."""
        return self.base.shape

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        # Sums in one order, whatever the number of rows and the BLAS: equal bytes everywhere.
        b = self.b[rows]
        with np.errstate(over="ignore", invalid="ignore"):
            delta: NDArray[np.float32] = b[:, :1] * self.a[0]
            for i in range(1, len(self.a)):
                delta += b[:, i : i + 1] * self.a[i]
            delta += self.base[rows]
        return delta
