"""What a model is: sizes, RoPE and special tokens, under the names transformers gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.families import ATTENTION, FEED_FORWARD
from tmac_py.hf_config import read_fields
from tmac_py.json_values import MAX_SIZE, number, require_int
from tmac_py.rope import Rope, check_rope_scaling, rope_frequencies
from tmac_py.spec import Tables

HIDDEN_ACTS = ("silu", "gelu_pytorch_tanh", "relu2")
"""Known ``hidden_act``: the second is GELU by tanh, relu2 the square of relu."""

_MAX_LAYERS = 4096
_MAX_HEAD_DIM = 65536
_MAX_EXPERTS = 4096
_PROJECTIONS = (*ATTENTION, *FEED_FORWARD)
_ROUTER = ".mlp.gate.weight"
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder. Immutable; construction does not check, ``validate`` does.

    ``rope_scaling`` is None for plain RoPE, else a dict with "rope_type" and the keys of that type
    (tmac_py.rope). ``sliding_window`` counts positions, 0 means none. ``activation_bits`` is 8 for
    models whose matrices get their inputs rounded to 8 bits per token, as in BitNet b1.58, None for
    others. The fields after it are steps that only some families have (tmac_py.families):

    sub_norms: norms before o_proj and down_proj. out_norms: norms of what attention and
    feed-forward add. qk_norm: norms of each head of q and k. biases: projections that have one.
    partial_rotary_factor: the share of a head that RoPE turns. full_attention_layers: layers
    without the window. layers_without_rope: those. rope_local_base_freq: base of plain RoPE in
    layers with a window. query_pre_attn_scalar: scores are divided by its root, None means
    ``head_dim``. attn_logit_softcapping, final_logit_softcapping: ``cap * tanh(x / cap)`` of scores
    and logits. embedding_scale: of the embedding's rows.

    full_qk_norm: norms of all heads of q together, and of k. clip_qkv: the largest absolute value
    in q, k and v. num_experts: feed-forwards of a layer, 0 means one; num_experts_per_tok of them,
    of ``moe_intermediate_size``, are chosen for a token and weighed by a softmax, of the chosen
    ones only if ``norm_topk_prob``. dense_layers: layers that have one all the same.
    """

    architecture: str = "llama"
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int
    tie_word_embeddings: bool
    sliding_window: int = 0
    hidden_act: str = "silu"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    activation_bits: int | None = None
    sub_norms: bool = False
    out_norms: bool = False
    qk_norm: bool = False
    biases: tuple[str, ...] = ()
    partial_rotary_factor: float = 1.0
    full_attention_layers: tuple[int, ...] = ()
    layers_without_rope: tuple[int, ...] = ()
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    embedding_scale: float = 1.0
    full_qk_norm: bool = False
    clip_qkv: float | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    dense_layers: tuple[int, ...] = ()

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
    ) -> ModelConfig:
        """Read the contents of config.json and, if there is one, generation_config.json.

        The end-of-text tokens of generation_config win over those of config. Raises
        UnsupportedError for what this package cannot run, ModelFileError for missing or
        inconsistent values.
        """
        result = cls(**read_fields(config, generation_config))
        result.validate()
        return result

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, without steps that the family does not have.

        ``from_dict`` is the inverse.
        """
        values = {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}
        for field in fields(self):
            if field.name in OPTIONAL and getattr(self, field.name) == field.default:
                del values[field.name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read what ``to_dict`` wrote.

        Raises ModelFileError for an unknown, missing or mistyped key, UnsupportedError for a model
        that cannot be run.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ModelFileError(f"config: unknown key {', '.join(unknown)}")
        if missing := [name for name in names if name not in values and name not in OPTIONAL]:
            raise ModelFileError(f"config: missing key {', '.join(missing)}")
        typed = dict(values)
        for name in _NUMBERS & set(typed):
            if typed[name] is not None or name not in _NUMBERS_OR_NONE:
                typed[name] = number(typed, name)
        for name in _LISTS & set(typed):
            if not isinstance(typed[name], list):
                raise ModelFileError(f"config: {name} must be a list of {_LIST_OF[name]}")
            typed[name] = tuple(typed[name])
        result = cls(**typed)
        result.validate()
        return result

    def validate(self) -> None:
        """Raise UnsupportedError or ModelFileError, naming the key, unless all make sense."""
        if self.architecture != "llama":
            raise UnsupportedError(f"architecture {self.architecture!r} is not supported (llama)")
        if self.hidden_act not in HIDDEN_ACTS:
            raise UnsupportedError(
                f"hidden_act {self.hidden_act!r} is not supported ({', '.join(HIDDEN_ACTS)})"
            )
        for name in _SIZES:
            require_int(name, getattr(self, name), 1, MAX_SIZE)
        require_int("num_hidden_layers", self.num_hidden_layers, 1, _MAX_LAYERS)
        require_int("head_dim", self.head_dim, 1, _MAX_HEAD_DIM)
        require_int("sliding_window", self.sliding_window, 0, MAX_SIZE)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ModelFileError(f"config: {name} must be true or false")
        bits = self.activation_bits
        if bits is not None and (type(bits) is not int or bits != 8):
            raise ModelFileError(f"config: activation_bits must be 8 or absent, found {bits!r}")
        for name in sorted(_NUMBERS):
            value = getattr(self, name)
            if value is None and name in _NUMBERS_OR_NONE:
                continue
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                raise ModelFileError(f"config: {name} must be a positive number, found {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelFileError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ModelFileError(f"config: head_dim must be even, found {self.head_dim}")
        if self.partial_rotary_factor > 1 or self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ModelFileError(
                f"config: partial_rotary_factor {self.partial_rotary_factor} gives "
                f"{self.rotary_dim} of {self.head_dim} dimensions; an even number is needed"
            )
        if unknown := [name for name in self.biases if name not in _PROJECTIONS]:
            raise ModelFileError(f"config: biases: {unknown[0]!r} is not a projection")
        for name in ("full_attention_layers", "layers_without_rope", "dense_layers"):
            for layer in getattr(self, name):
                require_int(name, layer, 0, self.num_hidden_layers - 1)
        self._validate_experts()
        if self.bos_token_id is not None:
            require_int("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        for token in self.eos_token_ids:
            require_int("eos_token_ids", token, 0, MAX_SIZE)
        if self.rope_scaling is not None:
            if not isinstance(self.rope_scaling, dict):
                raise ModelFileError("config: rope_scaling must be null or an object")
            check_rope_scaling(self.rope_scaling)
        self.ropes()

    def _validate_experts(self) -> None:
        if self.full_qk_norm and self.qk_norm:
            raise ModelFileError("config: qk_norm and full_qk_norm exclude each other")
        require_int("num_experts", self.num_experts, 0, _MAX_EXPERTS)
        if self.num_experts == 0:
            for name in _OF_EXPERTS:
                if getattr(self, name):
                    raise ModelFileError(f"config: {name} needs num_experts")
            return
        require_int("num_experts_per_tok", self.num_experts_per_tok, 1, self.num_experts)
        require_int("moe_intermediate_size", self.moe_intermediate_size, 1, MAX_SIZE)
        if self.sub_norms or self.out_norms or set(self.biases) & set(FEED_FORWARD):
            raise UnsupportedError(
                "num_experts together with sub_norms, out_norms or biases of the feed-forward is "
                "not supported"
            )

    @property
    def default_tables(self) -> Tables:
        """Lookup tables by which the model's activations are rounded as in its training."""
        return "exact8" if self.activation_bits == 8 else "int8"

    @property
    def rotary_dim(self) -> int:
        """The first elements of each head, which RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    def rope(self) -> tuple[NDArray[np.float32], float]:
        """Inverse frequencies float32 ``[rotary_dim / 2]`` and the factor on cos and sin.

        Raises ModelFileError where ``rope_theta`` and ``rope_scaling`` give no finite ones.
        """
        rope = self.ropes()[0]
        return rope.inv_freq, rope.attention_scale

    def ropes(self) -> list[Rope]:
        """RoPE as in ``rope``; a second one is that of layers with a window."""
        ropes = [
            rope_frequencies(
                rotary_dim=self.rotary_dim, theta=self.rope_theta, scaling=self.rope_scaling
            )
        ]
        if self.rope_local_base_freq is not None:
            ropes.append(
                rope_frequencies(
                    rotary_dim=self.rotary_dim, theta=self.rope_local_base_freq, scaling=None
                )
            )
        return ropes

    def window_of(self, layer: int) -> int:
        """Positions that a layer attends to, 0 for all."""
        return 0 if layer in self.full_attention_layers else self.sliding_window

    def rope_of(self, layer: int) -> int:
        """Which of ``ropes`` a layer has, -1 for none."""
        if layer in self.layers_without_rope:
            return -1
        return int(self.rope_local_base_freq is not None and self.window_of(layer) > 0)

    def experts_of(self, layer: int) -> int:
        """Feed-forwards that a layer chooses among, 0 for one and no choice."""
        return 0 if layer in self.dense_layers else self.num_experts

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor.

        Matrices ``(m, k)``, norms and biases ``(n,)``, routers of experts ``(num_experts, k)``,
        which are no matrices by `is_matrix`.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, self.hidden_size)
        }
        for index in range(self.num_hidden_layers):
            for name, shape in self._layer_shapes(self.experts_of(index)).items():
                shapes[f"model.layers.{index}.{name}"] = shape
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self, experts: int) -> dict[str, tuple[int, ...]]:
        hidden = self.hidden_size
        q_rows = self.num_attention_heads * self.head_dim
        kv_rows = self.num_key_value_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (q_rows, hidden),
            "self_attn.k_proj.weight": (kv_rows, hidden),
            "self_attn.v_proj.weight": (kv_rows, hidden),
        }
        if self.qk_norm:
            layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (self.head_dim,)
        if self.full_qk_norm:
            layer["self_attn.q_norm.weight"] = (q_rows,)
            layer["self_attn.k_norm.weight"] = (kv_rows,)
        if self.sub_norms:
            layer["self_attn.attn_sub_norm.weight"] = (q_rows,)
        layer["self_attn.o_proj.weight"] = (hidden, q_rows)
        layer["post_attention_layernorm.weight"] = (hidden,)
        if self.out_norms:
            layer["pre_feedforward_layernorm.weight"] = (hidden,)
        width = self.moe_intermediate_size if experts else self.intermediate_size
        if experts:
            layer["mlp.gate.weight"] = (experts, hidden)
        for module in [f"mlp.experts.{i}" for i in range(experts)] or ["mlp"]:
            layer[f"{module}.gate_proj.weight"] = layer[f"{module}.up_proj.weight"] = (
                width,
                hidden,
            )
            if self.sub_norms:
                layer[f"{module}.ffn_sub_norm.weight"] = (width,)
            layer[f"{module}.down_proj.weight"] = (hidden, width)
        if self.out_norms:
            layer["post_feedforward_layernorm.weight"] = (hidden,)
        for name in self.biases:
            module = f"{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            layer[f"{module}.bias"] = layer[f"{module}.weight"][:1]
        return layer


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the model is a matrix with codes: routers are kept as floats."""
    return len(shape) == 2 and not name.endswith(_ROUTER)


OPTIONAL = frozenset(
    (
        "activation_bits",
        "sub_norms",
        "out_norms",
        "qk_norm",
        "biases",
        "partial_rotary_factor",
        "full_attention_layers",
        "layers_without_rope",
        "rope_local_base_freq",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "embedding_scale",
        "full_qk_norm",
        "clip_qkv",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "dense_layers",
    )
)
"""Fields that a .lut has only where they say something."""

_NUMBERS_OR_NONE = frozenset(
    (
        "rope_local_base_freq",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "clip_qkv",
    )
)
_NUMBERS = _NUMBERS_OR_NONE | {
    "rms_norm_eps",
    "rope_theta",
    "partial_rotary_factor",
    "embedding_scale",
}
_LIST_OF = {
    "eos_token_ids": "integers",
    "biases": "names",
    "full_attention_layers": "integers",
    "layers_without_rope": "integers",
    "dense_layers": "integers",
}
_LISTS = frozenset(_LIST_OF)
_FLAGS = (
    "tie_word_embeddings",
    "sub_norms",
    "out_norms",
    "qk_norm",
    "full_qk_norm",
    "norm_topk_prob",
)
_OF_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "dense_layers")
