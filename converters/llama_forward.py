"""A decoder layer of the llama family in float32 NumPy, for the calibration of quantisers.

It runs layer by layer over whole texts and shows what every matrix is multiplied with; the decoder
of the core works on packed weights and shows logits only.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tmac_py.config import OPTIONAL, ModelConfig
from tmac_py.errors import UnsupportedError
from tmac_py.parallel import map_threads

Floats = NDArray[np.float32]

Layer = dict[str, Floats]
"""Matrices ``[m, k]`` and norms ``[n]`` of one layer, ``self_attn.q_proj`` for
``model.layers.N.self_attn.q_proj.weight``."""

STAGES: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Matrices that are multiplied with the same vectors, in the order in which they are used."""

Visit = Callable[[tuple[str, ...], Floats], None]
"""Called with a stage and its inputs ``[tokens, k]`` before they are used; may change the layer."""


class LlamaForward:
    """The layers of one model on texts ``[n, length]`` (Touvron et al., 2023)."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        self._config = config
        if config.num_experts:
            raise UnsupportedError(
                "calibration does not know models with experts: it cannot see which inputs reach "
                "each of them"
            )
        if steps := sorted(set(config.to_dict()) & OPTIONAL - {"activation_bits"}):
            raise UnsupportedError(f"calibration does not know models with {', '.join(steps)}")
        if config.hidden_act != "silu":
            raise UnsupportedError(f"calibration does not know hidden_act {config.hidden_act!r}")
        frequencies, factor = config.rope()
        angles = np.arange(length)[:, None] * frequencies.astype(np.float64)
        self._cos = (np.cos(angles) * factor).astype(np.float32)[:, None]  # [length, 1, half]
        self._sin = (np.sin(angles) * factor).astype(np.float32)[:, None]
        back = np.arange(length)[:, None] - np.arange(length)
        seen = back >= 0
        if config.sliding_window:
            seen &= back < config.sliding_window
        self._mask = np.where(seen, np.float32(0), np.float32(-np.inf))

    def run_layer(self, layer: Layer, hidden: Floats, visit: Visit) -> None:
        """Add what ``layer`` computes to ``hidden`` ``[n, length, hidden_size]``, in place."""
        qkv, o, gate_up, down = STAGES
        x = self.normalise(hidden, layer["input_layernorm"])
        visit(qkv, flat(x))
        x = _map_texts(lambda text: self._attend(layer, text), x)
        visit(o, flat(x))
        _add_products(hidden, x, layer[o[0]])
        x = self.normalise(hidden, layer["post_attention_layernorm"])
        visit(gate_up, flat(x))
        x = _map_texts(lambda text: _gated(*(text @ layer[name].T for name in gate_up)), x)
        visit(down, flat(x))
        _add_products(hidden, x, layer[down[0]])

    def normalise(self, hidden: Floats, weight: Floats) -> Floats:
        """RMSNorm."""
        square = np.square(hidden).mean(axis=-1, keepdims=True, dtype=np.float64)
        inverse = (1 / np.sqrt(square + self._config.rms_norm_eps)).astype(np.float32)
        return np.asarray(hidden * inverse * weight)

    def _attend(self, layer: Layer, x: Floats) -> Floats:
        """The heads' outputs ``[length, heads * head_dim]`` of one text."""
        config = self._config
        q, k, v = ((x @ layer[name].T).reshape(len(x), -1, config.head_dim) for name in STAGES[0])
        q, k = self._rotate(q), self._rotate(k)
        out = np.empty_like(q)
        shared = config.num_attention_heads // config.num_key_value_heads
        for head in range(config.num_attention_heads):
            scores = q[:, head] @ k[:, head // shared].T
            scores *= np.float32(config.head_dim**-0.5)
            scores += self._mask
            scores -= scores.max(axis=1, keepdims=True)
            np.exp(scores, out=scores)
            scores /= scores.sum(axis=1, keepdims=True)
            out[:, head] = scores @ v[:, head // shared]
        return out.reshape(len(x), -1)

    def _rotate(self, x: Floats) -> Floats:
        first, second = np.split(x, 2, axis=-1)
        cos, sin = self._cos, self._sin
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def flat(x: Floats) -> Floats:
    """``[n, length, k]`` as ``[tokens, k]``."""
    return x.reshape(-1, x.shape[-1])


def _map_texts(function: Callable[[Floats], Floats], x: Floats) -> Floats:
    return np.stack(map_threads(function, x))


def _add_products(hidden: Floats, x: Floats, w: Floats) -> None:
    def add(i: int) -> None:
        hidden[i] += x[i] @ w.T

    map_threads(add, range(len(x)))


def _gated(gate: Floats, up: Floats) -> Floats:
    """``silu(gate) * up``."""
    with np.errstate(over="ignore"):  # exp of a large number: the quotient is 0
        gate /= 1 + np.exp(-gate)
    gate *= up
    return gate
