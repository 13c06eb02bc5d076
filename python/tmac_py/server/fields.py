"""Fields of a JSON request: present, of the right type, allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tmac_py.checks import is_finite
from tmac_py.server.errors import invalid


def read_text(body: Mapping[str, Any], name: str, default: str | None = None) -> str | None:
    """A text, or ``default`` where the field is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise invalid(f"{name} is {_shown(value)}; allowed: a text", name)
    return value


def read_flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise invalid(f"{name} is {_shown(value)}; allowed: true, false", name)
    return value


def read_whole(body: Mapping[str, Any], name: str, low: int, high: int | None = None) -> int | None:
    """A whole number from ``low`` to ``high``."""
    value = body.get(name)
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        upper = "up" if high is None else f"to {high}"
        raise invalid(f"{name} is {_shown(value)}; allowed: {low} {upper}", name)
    return int(value)


def read_real(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    """A number from ``low`` to ``high``."""
    value = body.get(name)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not is_finite(value) or not low <= value <= high:
        raise invalid(f"{name} is {_shown(value)}; allowed: {low:g} to {high:g}", name)
    return float(value)


def read_object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object; an empty one where it is missing."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise invalid(f"{name} is {_shown(value)}; allowed: an object", name)
    return value


def refuse(body: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    """Fail on fields that are known and not supported, but for values that ask for nothing."""
    for name, values in allowed.items():
        value = body.get(name)
        if value is not None and value not in values:
            only = ", ".join(_shown(value) for value in values) or "leaving it out"
            raise invalid(f"{name} is not supported; allowed: {only}", name)


def _shown(value: object) -> str:
    """A value in an error, cut short."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
