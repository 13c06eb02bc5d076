"""What a model is: sizes, RoPE and special tokens, under the names transformers gives them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.rope import check_rope_scaling, normalize_rope_scaling, rope_frequencies
from tmac_py.spec import Tables

MODEL_TYPES = ("llama", "mistral", "bitnet")
"""``model_type`` in config.json: Llama 2/3, SmolLM2 and TinyLlama all say "llama"."""

HIDDEN_ACTS = ("silu", "relu2")
"""Known ``hidden_act``; relu2 is the square of relu."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "bitnet": {
        "num_key_value_heads": 5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "relu2",
    },
}
"""What transformers takes for keys that config.json lacks, where it is not as for all."""

_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 4096
_MAX_HEAD_DIM = 65536
_BITNET = ("activation_bits", "sub_norms")
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
    others. ``sub_norms`` are those before o_proj and down_proj that BitNet has.
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
        _refuse_unsupported(config)
        model_type = config["model_type"]
        defaults = _DEFAULTS[model_type]
        heads = _integer(config, "num_attention_heads")
        hidden = _integer(config, "hidden_size")
        context = _integer(config, "max_position_embeddings", 2048)
        rope = _rope_settings(config)
        theta = rope.get("rope_theta") or config.get("rope_theta")
        if theta is None:
            theta = defaults.get("rope_theta", 10000.0)
        eos = (generation_config or {}).get("eos_token_id")
        if eos is None:
            eos = config.get("eos_token_id")
        result = cls(
            hidden_size=hidden,
            intermediate_size=_integer(config, "intermediate_size"),
            num_hidden_layers=_integer(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_integer(
                config, "num_key_value_heads", defaults.get("num_key_value_heads", heads)
            ),
            head_dim=_integer(config, "head_dim", hidden // max(heads, 1)),
            vocab_size=_integer(config, "vocab_size"),
            rms_norm_eps=_number(config, "rms_norm_eps", defaults.get("rms_norm_eps", 1e-6)),
            rope_theta=_number({"rope_theta": theta}, "rope_theta"),
            rope_scaling=normalize_rope_scaling(rope, max_position_embeddings=context),
            max_position_embeddings=context,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=_sliding_window(config) if model_type == "mistral" else 0,
            hidden_act=config.get("hidden_act", defaults.get("hidden_act", "silu")),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            activation_bits=_activation_bits(config),
            sub_norms=model_type == "bitnet" or _is_1bitllm(config),
        )
        result.validate()
        return result

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, without those of BitNet models in others.

        ``from_dict`` is the inverse.
        """
        values = {**asdict(self), "eos_token_ids": list(self.eos_token_ids)}
        unused = [name for name in _BITNET if not values[name]]
        return {name: value for name, value in values.items() if name not in unused}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read what ``to_dict`` wrote.

        Raises ModelFileError for an unknown, missing or mistyped key, UnsupportedError for a model
        that cannot be run.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ModelFileError(f"config: unknown key {', '.join(unknown)}")
        if missing := [name for name in names if name not in values and name not in _BITNET]:
            raise ModelFileError(f"config: missing key {', '.join(missing)}")
        typed = dict(values)
        for name in ("rms_norm_eps", "rope_theta"):
            typed[name] = _number(typed, name)
        if not isinstance(typed["eos_token_ids"], list):
            raise ModelFileError("config: eos_token_ids must be a list of integers")
        typed["eos_token_ids"] = tuple(typed["eos_token_ids"])
        result = cls(**typed)
        result.validate()
        result.check_runnable()
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
            _require_int(name, getattr(self, name), 1, _MAX_SIZE)
        _require_int("num_hidden_layers", self.num_hidden_layers, 1, _MAX_LAYERS)
        _require_int("head_dim", self.head_dim, 1, _MAX_HEAD_DIM)
        _require_int("sliding_window", self.sliding_window, 0, _MAX_SIZE)
        for name in ("tie_word_embeddings", "sub_norms"):
            if not isinstance(getattr(self, name), bool):
                raise ModelFileError(f"config: {name} must be true or false")
        bits = self.activation_bits
        if bits is not None and (type(bits) is not int or bits != 8):
            raise ModelFileError(f"config: activation_bits must be 8 or absent, found {bits!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, float) or not math.isfinite(value) or value <= 0:
                raise ModelFileError(f"config: {name} must be a positive number, found {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelFileError(
                f"config: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ModelFileError(f"config: head_dim must be even, found {self.head_dim}")
        if self.bos_token_id is not None:
            _require_int("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        for token in self.eos_token_ids:
            _require_int("eos_token_ids", token, 0, _MAX_SIZE)
        if self.rope_scaling is not None:
            if not isinstance(self.rope_scaling, dict):
                raise ModelFileError("config: rope_scaling must be null or an object")
            check_rope_scaling(self.rope_scaling)
        self.rope()

    def check_runnable(self) -> None:
        """Raise UnsupportedError, naming all of it, where a model has what no decoder runs yet."""
        lacking = []
        if self.hidden_act != "silu":
            lacking.append(f"hidden_act {self.hidden_act!r}")
        if self.sub_norms:
            lacking.append("norms before o_proj and down_proj (attn_sub_norm, ffn_sub_norm)")
        if lacking:
            raise UnsupportedError(f"models with {' and '.join(lacking)} cannot be run yet")

    @property
    def default_tables(self) -> Tables:
        """Lookup tables by which the model's activations are rounded as in its training."""
        return "exact8" if self.activation_bits == 8 else "int8"

    def rope(self) -> tuple[NDArray[np.float32], float]:
        """Inverse frequencies float32 ``[head_dim / 2]`` and the factor on cos and sin.

        Raises ModelFileError where ``rope_theta`` and ``rope_scaling`` give no finite ones.
        """
        return rope_frequencies(
            head_dim=self.head_dim, theta=self.rope_theta, scaling=self.rope_scaling
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor: matrices ``(m, k)``, norms ``(hidden_size,)``."""
        hidden, feed_forward = self.hidden_size, self.intermediate_size
        q_rows = self.num_attention_heads * self.head_dim
        kv_rows = self.num_key_value_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q_rows, hidden),
            "self_attn.k_proj": (kv_rows, hidden),
            "self_attn.v_proj": (kv_rows, hidden),
            **({"self_attn.attn_sub_norm": (q_rows,)} if self.sub_norms else {}),
            "self_attn.o_proj": (hidden, q_rows),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (feed_forward, hidden),
            "mlp.up_proj": (feed_forward, hidden),
            **({"mlp.ffn_sub_norm": (feed_forward,)} if self.sub_norms else {}),
            "mlp.down_proj": (hidden, feed_forward),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for index in range(self.num_hidden_layers):
            for name, shape in layer.items():
                shapes[f"model.layers.{index}.{name}.weight"] = shape
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedError(
            f"config.json: model_type {model_type!r} is not supported ({', '.join(MODEL_TYPES)})"
        )
    names = _architectures(config)
    if names and not any(name.endswith("ForCausalLM") for name in names):
        raise UnsupportedError(
            f"config.json: architecture {names[0]} is not supported "
            "(LlamaForCausalLM, MistralForCausalLM, BitNetForCausalLM)"
        )
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UnsupportedError(f"config.json: {key} is not supported (only false)")


def _architectures(config: Mapping[str, Any]) -> list[str]:
    stated = config.get("architectures") or []
    return [str(name) for name in (stated if isinstance(stated, list) else [stated])]


def _is_1bitllm(config: Mapping[str, Any]) -> bool:
    """Models of 1bitLLM, which say "llama" and have norms that transformers' bitnet has as well."""
    return "BitnetForCausalLM" in _architectures(config)


def _activation_bits(config: Mapping[str, Any]) -> int | None:
    """8 for BitNet b1.58: by its quantisation settings, or 1bitLLM's own keys."""
    if _is_1bitllm(config):
        if (bits := config.get("input_bits", 8)) != 8:
            raise UnsupportedError(f"config.json: input_bits {bits!r} is not supported (8)")
        return 8
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    return 8 if method == "bitnet" else None


def _sliding_window(config: Mapping[str, Any]) -> int:
    """Mistral's window: an absent key means 4096 there, null means none."""
    if config.get("sliding_window", 4096) is None:
        return 0
    return _integer(config, "sliding_window", 4096)


def _rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` or ``rope_scaling``, with what some checkpoints keep beside them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ModelFileError(
            f"config.json: rope_scaling must be null or an object, found {reprlib.repr(rope)}"
        )
    beside = {"partial_rotary_factor": config.get("partial_rotary_factor"), **rope}
    kind = rope.get("rope_type") or rope.get("type")
    if kind in ("dynamic", "llama3", "yarn") and "original_max_position_embeddings" in config:
        beside["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return beside


def _integer(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelFileError(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_SIZE:
        raise ModelFileError(
            f"config.json: {key} must be an integer from 0 to {_MAX_SIZE}, "
            f"found {reprlib.repr(value)}"
        )
    return value


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key)
    if value is None:
        value = default
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:  # an integer that no float can hold
        pass
    raise ModelFileError(f"config: {key} must be a number, found {reprlib.repr(value)}")


def _require_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ModelFileError(
            f"config: {name} must be an integer from {low} to {high}, found {reprlib.repr(value)}"
        )
