"""Rotary position embeddings: inverse frequencies of each scaling kind, as in transformers."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from tmac_py.errors import ModelFileError, UnsupportedError
from tmac_py.json_values import MAX_SIZE

_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
    "factors": ("factors",),
    "longrope": (
        "factor",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
    ),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor",),
}
_LISTS = ("factors", "short_factor", "long_factor")
ROPE_TYPES = ("default", *_REQUIRED)
"""Scaling kinds: transformers' names, and "factors", which divides each frequency by a number."""


class Rope(NamedTuple):
    """One way to turn heads.

    ``inv_freq`` float32 ``[rotary_dim / 2]``; ``long_inv_freq`` is None, or those of contexts of
    more than ``original_context`` tokens; ``attention_scale`` is the factor on cos and sin.
    """

    inv_freq: NDArray[np.float32]
    attention_scale: float
    long_inv_freq: NDArray[np.float32] | None = None
    original_context: int = 0


def normalize_rope_scaling(
    scaling: Mapping[str, Any] | None, *, max_position_embeddings: int
) -> dict[str, Any] | None:
    """Bring transformers' ``rope_scaling`` / ``rope_parameters`` into one form.

    Returns None for plain RoPE, else a dict with "rope_type" and only the keys that this type
    reads; defaults that depend on the context length are filled in. Raises UnsupportedError for a
    type or a key that this package does not know, ModelFileError for a bad value.
    """
    if not scaling:
        return None
    given = {key: value for key, value in scaling.items() if value is not None}
    kind = given.pop("rope_type", given.get("type", "default"))
    partial = given.pop("partial_rotary_factor", 1.0)
    for ignored in ("type", "rope_theta", "finetuned"):
        given.pop(ignored, None)
    if kind not in ROPE_TYPES:
        raise UnsupportedError(f"rope type {kind!r} is not supported ({', '.join(ROPE_TYPES)})")
    if partial != 1.0:
        raise UnsupportedError(f"partial_rotary_factor {partial} is not supported (only 1)")
    if kind == "default":
        return None
    if kind in ("llama3", "yarn", "longrope"):
        original = given.setdefault("original_max_position_embeddings", max_position_embeddings)
        if kind != "llama3" and isinstance(original, int) and original > 0:
            given.setdefault("factor", max_position_embeddings / original)
    elif kind == "dynamic":
        _check_dynamic(given.pop("original_max_position_embeddings", None), max_position_embeddings)
    result = {"rope_type": kind, **given}
    check_rope_scaling(result)
    return result


def _check_dynamic(original: object, max_position_embeddings: int) -> None:
    """Refuse a context longer than the original one, where "dynamic" is no longer plain RoPE."""
    if original is None:
        return
    if not _is_positive(original):
        raise ModelFileError(
            "rope_scaling: original_max_position_embeddings must be positive, "
            f"found {reprlib.repr(original)}"
        )
    if original < max_position_embeddings:
        raise UnsupportedError(
            f"rope type 'dynamic' is supported within the original context only: "
            f"max_position_embeddings ({max_position_embeddings}) is larger than "
            f"original_max_position_embeddings ({original})"
        )


def check_rope_scaling(scaling: Mapping[str, Any]) -> None:
    """Raise UnsupportedError or ModelFileError, naming the key, unless ``scaling`` can be used."""
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in _REQUIRED:
        raise UnsupportedError(f"rope type {kind!r} is not supported ({', '.join(ROPE_TYPES)})")
    required = _REQUIRED[kind]
    optional = _OPTIONAL.get(kind, ())
    if missing := [key for key in required if key not in scaling]:
        raise ModelFileError(f"rope_scaling of type {kind!r} lacks {', '.join(missing)}")
    if unknown := sorted(set(scaling) - {"rope_type", *required, *optional}):
        raise UnsupportedError(
            f"rope_scaling of type {kind!r} does not know {', '.join(unknown)} "
            f"({', '.join((*required, *optional))})"
        )
    for key in (*required, *optional):
        value = scaling.get(key, 1)
        if key == "truncate":
            valid = isinstance(value, bool | int)
        elif key in _LISTS:
            valid = isinstance(value, list) and all(_is_positive(item) for item in value)
        else:
            valid = _is_positive(value)
        if not valid:
            raise ModelFileError(
                f"rope_scaling: {key} must be positive, found {reprlib.repr(value)}"
            )
    original = scaling.get("original_max_position_embeddings", 2)
    if kind == "longrope" and not (isinstance(original, int) and 2 <= original <= MAX_SIZE):
        raise ModelFileError(
            "rope_scaling: original_max_position_embeddings must be an integer of at least 2, "
            f"found {reprlib.repr(original)}"
        )
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ModelFileError("rope_scaling: high_freq_factor must be larger than low_freq_factor")


def rope_frequencies(*, rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Rope:
    """Inverse frequencies and the factor on cos and sin.

    "dynamic" is plain RoPE here: it changes frequencies only beyond ``max_position_embeddings``,
    which is where a context ends. "longrope" has two sets of frequencies (Ding et al., 2024, arXiv
    2402.13753). Raises ModelFileError where the numbers give no finite ones.
    """
    rope = None
    try:
        with np.errstate(all="ignore"):
            rope = _rope(rotary_dim=rotary_dim, theta=theta, scaling=scaling)
    except (ArithmeticError, ValueError):
        pass
    if rope is None or not all(np.isfinite(values).all() for values in rope if values is not None):
        raise ModelFileError(
            f"rope_theta {theta:g} and rope_scaling {reprlib.repr(scaling)} give no finite "
            "frequencies"
        )
    return rope


def _rope(*, rotary_dim: int, theta: float, scaling: Mapping[str, Any] | None) -> Rope:
    plain = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    kind = scaling["rope_type"] if scaling else "default"
    attention_scale = 1.0
    if scaling is None or kind in ("default", "dynamic"):
        freq = plain
    elif kind == "linear":
        freq = plain / scaling["factor"]
    elif kind == "factors":
        freq = plain / _factors(scaling, "factors", plain.size)
    elif kind == "longrope":
        return _longrope(plain, scaling)
    elif kind == "llama3":
        freq = _llama3(plain, scaling)
    elif kind == "yarn":
        freq = _yarn(plain, scaling, rotary_dim=rotary_dim, theta=theta)
        attention_scale = _yarn_attention_scale(scaling)
    else:
        raise UnsupportedError(f"rope type {kind!r} is not supported ({', '.join(ROPE_TYPES)})")
    return Rope(freq.astype(np.float32), attention_scale)


def _factors(scaling: Mapping[str, Any], key: str, size: int) -> NDArray[np.float64]:
    factors = np.asarray(scaling[key], dtype=np.float64)
    if factors.shape != (size,):
        raise ModelFileError(f"rope_scaling: {key} must hold {size} numbers, found {factors.size}")
    return factors


def _longrope(plain: NDArray[np.float64], scaling: Mapping[str, Any]) -> Rope:
    """Frequencies are divided by one list of factors, in long contexts by another."""
    short, long = (_factors(scaling, f"{name}_factor", plain.size) for name in ("short", "long"))
    original = scaling["original_max_position_embeddings"]
    return Rope(
        (plain / short).astype(np.float32),
        longrope_attention(scaling),
        (plain / long).astype(np.float32),
        original,
    )


def longrope_attention(scaling: Mapping[str, Any]) -> float:
    """The factor on cos and sin of "longrope"."""
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)
    factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
    return math.sqrt(1 + (math.log(factor) / math.log(original) if factor > 1 else 0.0))


def _llama3(plain: NDArray[np.float64], scaling: Mapping[str, Any]) -> NDArray[np.float64]:
    """Long waves are slowed down by ``factor``, short ones kept, those between blended."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(keep * plain + (1.0 - keep) * plain / scaling["factor"])


def _yarn(
    plain: NDArray[np.float64], scaling: Mapping[str, Any], *, rotary_dim: int, theta: float
) -> NDArray[np.float64]:
    """Blend by index: fast dimensions keep their frequency, slow ones are divided by ``factor``."""
    original = scaling["original_max_position_embeddings"]

    def index_of(turns: float) -> float:
        """The (real) index of the dimension that makes this many turns in the original context."""
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = index_of(scaling.get("beta_fast", 32.0))
    high = index_of(scaling.get("beta_slow", 1.0))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    if low == high:
        high += 0.001
    slow = np.clip((np.arange(plain.size) - low) / (high - low), 0.0, 1.0)
    return np.asarray((1.0 - slow) * plain + slow * plain / scaling["factor"])


def _yarn_attention_scale(scaling: Mapping[str, Any]) -> float:
    factor = scaling["factor"]

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    if "mscale" in scaling and "mscale_all_dim" in scaling:
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def _is_positive(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a number above 0 that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max
