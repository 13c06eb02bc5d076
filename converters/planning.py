"""Which matrix gets which settings, before any is quantised."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from tmac_py.config import ModelConfig
from tmac_py.converters.allocation import Choice, allocate, relative_error
from tmac_py.converters.checkpoint import HEADS, Checkpoint, TensorSource
from tmac_py.converters.model_layers import EMBEDDING, naming_tensor
from tmac_py.converters.options import QuantOptions
from tmac_py.converters.quantizers import Settings
from tmac_py.errors import UnsupportedError
from tmac_py.lutheader import packed_nbytes
from tmac_py.quant import MAX_BCQ_BITS, MAX_BITS, QuantTensor, resolve_group_size
from tmac_py.spec import LAYOUTS, LinearSpec

TOLERANCE = 0.01
"""Part of ``target_bpw`` that a file may stay below it."""


def plan_settings(
    checkpoint: Checkpoint,
    options: QuantOptions,
    mean_squares: Mapping[str, NDArray[np.float32]],
) -> dict[str, Settings]:
    """The settings of every matrix that is stored as floats, by its name.

    ``mean_squares`` are those of the inputs, for ``target_bpw``: of all matrices or of none.
    Raises UnsupportedError for a pattern that no name holds and a target that cannot be met.
    """
    names = [tensor.name for tensor in checkpoint.tensors if tensor.dense]
    for pattern, _ in options.bits_for:
        if not any(re.search(pattern, name) for name in names):
            raise UnsupportedError(
                f"bits_for {pattern!r} would have no effect: no matrix stored as floats has it in "
                "its name"
            )
    if options.target_bpw is not None:
        return _plan_target(checkpoint, options, mean_squares)
    return {name: options.settings(_known(options.bits_of(name))) for name in names}


def _known(bits: int | None) -> int:
    assert bits is not None
    return bits


def _plan_target(
    checkpoint: Checkpoint,
    options: QuantOptions,
    mean_squares: Mapping[str, NDArray[np.float32]],
) -> dict[str, Settings]:
    """Every matrix of the file counts, those whose codes are kept or whose bits are fixed too."""
    assert options.target_bpw is not None
    plan: dict[str, Settings] = {}
    choices: dict[str, list[Choice]] = {}
    fixed, weights = 0, 0
    for tensor in checkpoint.tensors:
        if not tensor.is_matrix:
            continue
        weights += tensor.n_elements
        if not tensor.dense:
            stored = tensor.load()
            assert isinstance(stored, QuantTensor)
            fixed += packed_nbytes(stored.spec)
        elif (bits := options.bits_of(tensor.name)) is not None:
            plan[tensor.name] = options.settings(bits)
            fixed += _nbytes(tensor, options, bits)
        else:
            with naming_tensor(tensor.name):
                mean_square = mean_squares.get(tensor.name)
                choices[tensor.name] = _choices(tensor, options, mean_square, checkpoint.config)
    if not choices:
        raise UnsupportedError(
            "target_bpw would have no effect: the bits of all matrices are given"
        )
    target = options.target_bpw
    chosen = allocate(choices, math.floor(target * weights / 8) - fixed)
    reached = 8 * (fixed + sum(choice.nbytes for choice in chosen.values())) / weights
    if not (1 - TOLERANCE) * target <= reached <= target:
        least, most = (
            8 * (fixed + sum(options[end].nbytes for options in choices.values())) / weights
            for end in (0, -1)
        )
        raise UnsupportedError(
            f"target_bpw {target:g} cannot be met: the closest is {reached:.3f} bits per weight, "
            f"scales and offsets included (possible: {least:.3f} to {most:.3f})"
        )
    for name, choice in chosen.items():
        plan[name] = options.settings(choice.bits)
    return plan


def _choices(
    tensor: TensorSource,
    options: QuantOptions,
    mean_square: NDArray[np.float32] | None,
    config: ModelConfig,
) -> list[Choice]:
    """How much a relative error counts: each of n layers adds about one part in n to the hidden
    state, and all of it passes through the embedding, whose rows are used as they are, and through
    lm_head; a matrix that is both counts twice."""
    matrix = tensor.load()
    assert not isinstance(matrix, QuantTensor)
    seen: list[NDArray[np.float32] | None] = [None] if tensor.name == EMBEDDING else [mean_square]
    if tensor.name == EMBEDDING and config.tie_word_embeddings:
        seen.append(mean_square)
    weight = config.num_hidden_layers if tensor.name in HEADS else 1
    choices = []
    for bits in range(1, MAX_BITS + 1):
        settings = options.settings(bits)
        error = weight * sum(relative_error(matrix, settings, x) for x in seen)
        choices.append(Choice(bits, _nbytes(tensor, options, bits), error))
    return choices


def _nbytes(tensor: TensorSource, options: QuantOptions, bits: int) -> int:
    m, k = tensor.shape
    settings = options.settings(bits)
    binary = options.method.binary and bits <= MAX_BCQ_BITS
    return packed_nbytes(
        LinearSpec(
            m,
            k,
            bits,
            resolve_group_size(k, settings.group_size),
            "offset" if settings.asym else "none",
            layout=LAYOUTS["bcq" if binary else "uniform"],
        )
    )
