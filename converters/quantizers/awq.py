"""``awq``: activation-aware weight quantisation (Lin et al., 2023).

Columns that meet large activations are multiplied by a scale before they are rounded, and what
produces these activations is divided by it: a norm (q, k, v; gate, up), the rows of v (o) or of up
(down). The model computes the same, but the rounding errors of these columns shrink. The scales
are ``mean(|x|)**alpha``, with the ``alpha`` of the least squared output error. Ranges are then
searched as by ``mse``, with the error of each column weighted by mean ``x**2``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tmac_py.config import ModelConfig
from tmac_py.converters.llama_forward import STAGES, Layer
from tmac_py.converters.quantizers.base import Inputs, Settings
from tmac_py.parallel import map_threads
from tmac_py.quant import quantize_rtn, row_chunks

ALPHAS = tuple(i / 20 for i in range(20))
_SAMPLE_TOKENS, _SAMPLE_ROWS = 512, 512
"""Tokens and rows of each matrix whose outputs are compared."""

_CHUNK_ELEMENTS = 1 << 17

Floats = NDArray[np.float32]

_PRODUCERS = dict(
    zip(
        STAGES,
        ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"),
        strict=True,
    )
)
"""Matrices that share inputs -> what produces them."""


@dataclass(frozen=True)
class Seen:
    """What the search needs of the inputs of a stage: mean ``|x|`` ``[k]``, some rows of ``x``."""

    mean_abs: Floats
    sample: Floats

    @classmethod
    def of(cls, inputs: Inputs) -> Seen:
        """Without the rest of the inputs, which may be large."""
        return cls(inputs.mean_abs, inputs.sample(_SAMPLE_TOKENS))


def fold_scales(
    layer: Layer,
    seen: Mapping[tuple[str, ...], Seen],
    settings: Mapping[str, Settings],
    config: ModelConfig,
) -> None:
    """Search the scales of each stage of ``layer`` and fold them into it, in place.

    ``settings`` has the matrices that will be quantised; a stage is left as it is unless they and
    its producer are all among them.
    """
    for stage, producer in _PRODUCERS.items():
        matrices = [name for name in stage if name in settings]
        if len(matrices) < len(stage) or (producer.endswith("_proj") and producer not in settings):
            continue
        mean_abs = seen[stage].mean_abs
        if producer == "self_attn.v_proj":
            mean_abs = shared_by_heads(mean_abs, config)
        scales = search_scales(
            [layer[name] for name in matrices],
            [settings[name] for name in matrices],
            mean_abs,
            seen[stage].sample,
        )
        fold(layer, stage, producer, scales, config)


def fold(
    layer: Layer, stage: tuple[str, ...], producer: str, scales: Floats, config: ModelConfig
) -> None:
    """Multiply the columns of the matrices of ``stage`` by ``scales`` [k], divide the producer."""
    for name in stage:
        layer[name] = layer[name] * scales
    if producer == "self_attn.v_proj":
        heads = scales.reshape(config.num_key_value_heads, -1, config.head_dim)
        scales = heads[:, 0].reshape(-1)  # query heads of a value head have the same ones
    made = layer[producer]
    layer[producer] = made / (scales if made.ndim == 1 else scales[:, None])


def shared_by_heads(values: Floats, config: ModelConfig) -> Floats:
    """``values`` [query heads x head_dim] averaged over the heads that share a value head."""
    heads = values.reshape(config.num_key_value_heads, -1, config.head_dim)
    shared = np.broadcast_to(heads.mean(axis=1, keepdims=True), heads.shape)
    return np.ascontiguousarray(shared.reshape(-1))


def search_scales(
    matrices: list[Floats], settings: list[Settings], mean_abs: Floats, x: Floats
) -> Floats:
    """The scales ``[k]`` with the least squared error of the outputs of ``x`` [tokens, k]."""
    best, best_error = np.ones_like(mean_abs), np.inf
    samples = [w[:: -(-len(w) // _SAMPLE_ROWS)] for w in matrices]
    for alpha in ALPHAS:
        scales = np.maximum(mean_abs, np.float32(1e-8)) ** np.float32(alpha)
        scales = np.maximum(scales / np.sqrt(scales.max() * scales.min()), np.float32(1e-4))
        error = sum(_output_error(w, s, scales, x) for w, s in zip(samples, settings, strict=True))
        if error < best_error:
            best, best_error = scales, error
    return best


def _output_error(w: Floats, settings: Settings, scales: Floats, x: Floats) -> float:
    """Squared error of the outputs of ``w`` [m, k] if it is quantised with these scales."""
    q = quantize_rtn(
        w * scales, bits=settings.bits, group_size=settings.group_size, asym=settings.asym
    )
    difference = q.dequantize() / scales - w
    parts = map_threads(
        lambda rows: float(np.square(x @ difference[rows].T).sum(dtype=np.float64)),
        row_chunks(w.shape[0], w.shape[1], _CHUNK_ELEMENTS),
    )
    return sum(parts)
