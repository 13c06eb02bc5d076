"""Numbers out of parsed JSON, or one clear error."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from tmac_py.errors import ModelFileError

MAX_SIZE = 2**31 - 1


def integer(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The integer from 0 to MAX_SIZE at ``key``; ``default`` where it is absent or null."""
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelFileError(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_SIZE:
        raise ModelFileError(
            f"config.json: {key} must be an integer from 0 to {MAX_SIZE}, "
            f"found {reprlib.repr(value)}"
        )
    return value


def number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The number at ``key``; ``default`` where it is absent or null."""
    value = values.get(key)
    if value is None:
        value = default
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    except OverflowError:  # an integer that no float can hold
        pass
    raise ModelFileError(f"config: {key} must be a number, found {reprlib.repr(value)}")


def optional_number(values: Mapping[str, Any], key: str, default: float | None) -> float | None:
    """The number at ``key``, None where it is null; ``default`` where it is absent."""
    if values.get(key, default) is None:
        return None
    return number(values, key, default)


def require_int(name: str, value: object, low: int, high: int) -> None:
    """Raise ModelFileError unless ``value`` is an integer in that range."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ModelFileError(
            f"config: {name} must be an integer from {low} to {high}, found {reprlib.repr(value)}"
        )
