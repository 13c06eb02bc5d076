"""Options that users give: checked once, with errors that name the option and what is allowed."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tmac_py.errors import OptionError, TmacError
from tmac_py.machine import MAX_THREADS, default_threads
from tmac_py.spec import KvType, Tables


def check_whole(
    name: str,
    value: Any,
    low: int,
    high: int | None = None,
    *,
    note: str = "",
    error: type[TmacError] = OptionError,
) -> int:
    """``value`` if it is a whole number from ``low`` to ``high`` (None: without limit).

    ``note`` explains special values in the error, which is of type ``error``.
    """
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = low - 1
    if number < low or (high is not None and number > high):
        upper = "up" if high is None else f"to {high}"
        raise error(f"{name} is {value!r}; allowed: {low} {upper}{note}")
    return number


def check_real(
    name: str, value: Any, low: float, high: float, allowed: str, *, above_low: bool = False
) -> None:
    """OptionError unless ``value`` is a finite number from ``low`` (or above it) to ``high``."""
    valid = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if valid:
        valid = is_finite(value) and low <= value <= high and not (above_low and value == low)
    if not valid:
        raise OptionError(f"{name} is {value!r}; allowed: {allowed}")


def is_finite(value: Any) -> bool:
    """Whether a number is one that a float can hold."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_variables(values: object) -> dict[str, Any]:
    """More names for a chat template; OptionError for others than it may be given."""
    if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise OptionError(f"chat_template_kwargs is {values!r}; allowed: names and their values")
    for name in ("messages", "tools", "add_generation_prompt"):
        if name in values:
            raise OptionError(f"chat_template_kwargs: {name!r} is not a variable to choose")
    return dict(values)


def check_ids(ids: ArrayLike, vocab_size: int) -> NDArray[np.int32]:
    """``ids`` as int32 [n], n >= 1; OptionError unless all are within the vocabulary."""
    try:
        array = np.asarray(ids)
    except ValueError as error:
        raise OptionError("token ids must be a sequence of integers") from error
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise OptionError("token ids must be a sequence of integers")
    if not array.size:
        raise OptionError("the prompt has no tokens")
    low = high = int(array[0])
    if array.size > 1:  # a token of an answer comes alone
        low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise OptionError(f"token id {outside} is outside the vocabulary of {vocab_size}")
    return np.ascontiguousarray(array, dtype=np.int32)


def check_threads(threads: int | None) -> int:
    """``threads`` if it is allowed; for None the performance cores this process may use."""
    return default_threads() if threads is None else check_whole("threads", threads, 1, MAX_THREADS)


def check_tables(tables: Tables) -> Tables:
    """``tables`` if it is the name of a kind of lookup tables."""
    allowed = get_args(Tables)
    if tables not in allowed:
        raise OptionError(f"tables is {tables!r}; allowed: {', '.join(map(repr, allowed))}")
    return tables


def check_kv(kv: str) -> tuple[KvType, KvType]:
    """Types of keys and of values that ``kv`` names: "int8", or both as in "int8/int4"."""
    allowed = get_args(KvType)
    parts = kv.split("/") if isinstance(kv, str) else []
    keys, values = (parts[0], parts[-1]) if len(parts) in (1, 2) else ("", "")
    if keys not in allowed or values not in allowed:
        raise OptionError(
            f"kv is {kv!r}; allowed: {', '.join(map(repr, allowed))}, "
            "or two of them for keys and values as in 'int8/int4'"
        )
    return cast(KvType, keys), cast(KvType, values)
